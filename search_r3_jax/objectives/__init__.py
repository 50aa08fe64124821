"""Losses as pure array functions; no model, no mesh, no config."""

# shellcheck shell=bash
# Sourced by the launchers: how a mistake is told, how a command is shown, what is never put into one.

# fail MESSAGE…: one line for a mistake the user can mend.
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# need TOOL WHERE: the tool is there, or where it comes from.
need() {
    command -v "$1" >/dev/null || fail "$1: not found; $2"
}

# value_of FLAG VALUE…: the value of a flag, when there is one.
value_of() {
    [ $# -ge 2 ] || fail "$1: a value is missing"
    printf '%s' "$2"
}

# quoted WORD…: a command as a shell reads it back.
quoted() {
    local text
    printf -v text '%q ' "$@"
    printf '%s' "${text% }"
}

# act COMMAND…: run it, or show it.
act() {
    if [ -n "${dry_run:-}" ]; then
        # Descriptor 3: also where the answer of a command is read.
        quoted "$@" >&3
        printf '\n' >&3
    else
        "$@" </dev/null
    fi
}

# check_arguments WORD…: what would break a command apart, and what every list of processes would show.
check_arguments() {
    local word number=0
    for word in "$@"; do
        number=$((number + 1))
        case "$word" in
        *$'\n'* | *$'\r'*) fail "argument $number: a line break within it" ;;
        esac
        if [[ "$word" =~ hf_[A-Za-z0-9]{16,} || "$word" =~ ://[^/]*:[^/]*@ ]]; then
            fail "argument $number: a password or token; commands are seen by others, so it has to come by the environment (--help)"
        fi
    done
}

# check_search_r3 COMMAND WORD…: what the search-r3 beside these launchers does not know. It is looked up in the sources, since this machine
# may have nothing installed: options by their last part alone, so that one of another section passes here and is refused by search-r3.
check_search_r3() {
    local sources command="$1" word before=''
    sources="$(cd "$(dirname "${BASH_SOURCE[0]}")/../search_r3_jax" 2>/dev/null && pwd)" || return 0
    if ! [[ "$command" =~ ^[a-z]+$ ]] || ! grep -q "subcommand(\"$command\"" "$sources/cli.py"; then
        fail "$command: search-r3 has no such command"
    fi
    shift
    for word in "$@"; do
        [ "$before" != --config ] || check_experiment "$sources" "$word"
        case "$word" in
        --) return ;;
        --help | --version) ;;
        --config=*) check_experiment "$sources" "${word#*=}" ;;
        --*) check_option "$sources" "$command" "${word%%=*}" ;;
        esac
        before="$word"
    done
}

# check_experiment SOURCES NAME: one of search_r3_jax/configs.
check_experiment() {
    local names
    if ! [[ "$2" =~ ^[a-z0-9_]+$ ]] || ! [ -f "$1/configs/$2.py" ]; then
        names="$(cd "$1/configs" && echo [a-z]*.py)"
        names="${names//.py/}"
        fail "--config: $2: no such experiment; there are ${names// /, }"
    fi
}

# check_option SOURCES COMMAND OPTION: a field of the settings or of a command, now or before it was renamed.
check_option() {
    local last="${3##*.}"
    last="${last#--}"
    last="${last#no-}"
    last="${last//-/_}"
    if ! [[ "$last" =~ ^[a-z][a-z0-9_]*$ ]] || ! grep -rqE --include='*.py' "^    $last: |name=\"$last\"|\"[a-z_.]*\.$last\":" \
        "$1/config" "$1/commands" "$1/distributed" "$1/evaluation/settings.py"; then
        fail "$3: search-r3 $2 has no such option; search-r3 $2 --help lists them"
    fi
}

# check_name FLAG VALUE: what the cloud takes as a name, so that it is never taken for a flag.
check_name() {
    [[ "$2" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "$1: '$2': small letters, digits and dashes, at most 40"
}

# check_word FLAG VALUE: nothing a shell or a flag could be made of.
check_word() {
    [[ "$2" =~ ^[A-Za-z0-9][A-Za-z0-9._:/@~+-]*$ ]] || fail "$1: '$2': letters, digits and . _ : / @ ~ + - only"
}

# check_count FLAG VALUE: a whole number, 0 or more.
check_count() {
    [[ "$2" =~ ^[0-9]{1,6}$ ]] || fail "$1: '$2': not a whole number"
}

# read_environment FILE: NAME=VALUE a line, taken as they stand; nothing in them is evaluated.
read_environment() {
    local line number=0
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        case "$line" in
        '' | '#'*) continue ;;
        esac
        # The line itself may be a secret.
        [[ "$line" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$1, line $number: not NAME=VALUE"
        export "${line?}"
    done <"$1"
}

exec 3>&1

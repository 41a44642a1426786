# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# What the soft-RoCE lab's programs share: where its cache lies, how it fails, and how words are quoted for the guest.
# Sourced, never run. For example `quoted "it's"` prints 'it'\''s', which every POSIX shell reads back as it's.

lab_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=ci/guest/lib.sh
. "$lab_dir/../guest/lib.sh"
guest_dir=$(cd "$lab_dir/../guest" && pwd)

# The lab's own failures are told from those of the program that it runs.
die_status=125

# The folder that holds everything downloaded or derived from downloads.
lab_cache() { printf '%s/softroce\n' "${FARBUS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/farbus}"; }

# Milliseconds since some moment in the past.
now_ms() { echo $(($(date +%s%N) / 1000000)); }

# Each word of "$@" for a POSIX shell, whatever bytes it has.
quoted() {
    local word separator=''
    for word; do
        printf "%s'%s'" "$separator" "${word//\'/\'\\\'\'}"
        separator=' '
    done
}

# Reads the next line from file descriptor $1 into `line`, for a second at most. What came of a line by then is kept for the next call.
hear() {
    local piece='' came=0
    IFS= read -r -t 1 -u "$1" piece || came=$?
    heard+=$piece
    ((came == 0)) || return 1
    line=$heard heard=''
}
heard=''

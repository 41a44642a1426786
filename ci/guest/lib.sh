# shellcheck shell=bash
# What the guest lab's programs share: where the cache lies, how a private program is run, and which files of a
# folder go into an image. Sourced, never run. For example `guest_paths` sets FARBUS_QEMU to
# ~/.cache/farbus/guest/lab-1-…/bin/qemu-system-x86_64, and runs `fetch` first if that is not there yet.

guest_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$*"
    exit "${die_status:-1}"
}

# The folder that holds everything downloaded or derived from downloads.
guest_cache() { printf '%s/guest\n' "${FARBUS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/farbus}"; }

# Sets the FARBUS_* variables that fetch prints. The output is shell assignments quoted by printf %q.
guest_paths() {
    local paths
    paths=$("$guest_dir/fetch") || die "cannot prepare QEMU and the kernel; see the lines above"
    eval "$paths"
}

# The regular files of folder $1 that go into an image, as relative paths, one a line, sorted bytewise, at most
# $2 of them with at most $3 bytes in all. The same folder gives the same list: check-image relies on that.
# Names with control characters, backslashes or quotes are left out, because manifests are line-based and
# debugfs has its own quoting.
chosen_files() {
    local dir=$1 most=$2 bytes=$3
    (
        cd "$dir" || exit
        export LC_ALL=C
        find . -type f -readable -size +0 -size -512k -printf '%s %P\n' |
            grep -v '[][:cntrl:]\\"[]' | sort -k2 |
            awk -v most="$most" -v left="$bytes" '
                n < most && $1 <= left { left -= $1; n++; sub(/^[0-9]+ /, ""); print }'
    )
}

# How much of an image of $1 bytes is filled with files: an eighth, at most 1,500 files. The rest is for the
# 64 MiB pattern file, the files written while the controller is reset, and the journal.
image_files() { chosen_files "$1" 1500 $(($2 / 8)); }

# A size like 256M, 1G or 268435456 in bytes.
size_bytes() {
    [[ $1 =~ ^[0-9]+[KMG]?$ ]] || die "size $1 is not a number with an optional K, M or G, such as 256M"
    numfmt --from=iec "$1"
}

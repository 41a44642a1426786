# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Packs a job for the soft-RoCE guest: a program of the host with the libraries that the guest lacks, files, environment.
# Sourced, never run. For example `pack_job /tmp/w a target/debug/farbus devices` makes /tmp/w/job, the image of a disk with a tar
# archive, in which the program has the path that it has on the host.
#
# Reads the options of ci/softroce: extra_files (HOST:GUEST), outs, environment (NAME=VALUE), limit, shell.

# Packs program $3 with arguments "${@:4}" for role $2 (one, a or b) in folder $1.
pack_job() {
    local folder=$1 role=$2 stage="$1/stage" pair address=192.0.2.1 peer=192.0.2.1
    local -A shipped=()
    local bytes rows=24 columns=80
    local needs_glibc=0
    shift 2
    case $role in
    a) peer=192.0.2.2 ;;
    b) address=192.0.2.2 ;;
    esac
    mkdir -p "$stage/run/farbus"
    for pair in "${extra_files[@]}"; do
        ship "${pair%%:*}" "${pair#*:}"
    done
    # A name without a slash is a program of the guest.
    if [[ ${1:-} == */* ]]; then
        [[ -f $1 && -x $1 ]] || die "$1 is no executable file; build it first, or give a program of the guest without a slash"
        set -- "$(absolute "$1")" "${@:2}"
        ship "$1" "$1"
    fi
    newer_glibc
    [[ -z $terminal ]] || read -r rows columns < <(stty size <&5)
    {
        printf 'export PATH=/usr/bin:/usr/sbin HOME=/root USER=root LANG=C.UTF-8 TERM=%s\n' "$(quoted "${shell:+${TERM:-linux}}")"
        printf 'export FARBUS_RDMA_DEV=rxe0 FARBUS_LAB_HOST=%s FARBUS_LAB_ADDRESS=%s FARBUS_LAB_PEER=%s\n' "${role/one/a}" $address $peer
        [[ -z $library_path ]] || printf 'export LD_LIBRARY_PATH=%s\n' "$(quoted "$library_path")"
        [[ -z $pci ]] || printf 'export %s\n' "${pci_environment[@]}"
        ((${#environment[@]} == 0)) || printf 'export %s\n' "$(quoted_environment)"
        printf 'mkdir -p %s\ncd %s\n' "$(quoted "$PWD")" "$(quoted "$PWD")"
    } >"$stage/run/farbus/environment"
    printf '. /run/farbus/environment\nexec %s\n' "$(quoted "$@")" >"$stage/run/farbus/job"
    {
        printf 'role=%s limit=%s shell=%s ' "${role/one/}" "$limit" "$shell"
        printf 'address=%s rows=%s columns=%s\n' "$address" "$rows" "$columns"
    } >"$stage/run/farbus/settings"
    printf '%s\n' "${outs[@]}" | sed '/^$/d' >"$stage/run/farbus/outs"
    tar -C "$stage" -chf "$folder/job" --owner=0 --group=0 . || die "cannot pack the job"
    bytes=$(stat -c %s "$folder/job")
    ((bytes <= job_disk_bytes)) || die "the job has $bytes bytes, more than the $job_disk_bytes of its disk: send fewer files"
    truncate -s "$job_disk_bytes" "$folder/job"
    rm -rf "$stage"
}

quoted_environment() {
    local pair
    for pair in "${environment[@]}"; do
        printf '%s=%s ' "${pair%%=*}" "$(quoted "${pair#*=}")"
    done
}

# Path $1 from the root, its links kept.
absolute() { realpath -ms -- "$1"; }

# Puts $1 of the host at $2 in the guest, with the libraries and the interpreter that it needs.
ship() {
    local host guest
    host=$(absolute "$1") guest=$(absolute "$2")
    # In the guest these are links, which an archive would replace.
    case $guest in /bin/* | /sbin/* | /lib/* | /lib64/*) guest=/usr$guest ;; esac
    [[ -z ${shipped[$guest]:-} ]] || return 0
    [[ -r $host ]] || die "$host: no such file, or not readable"
    [[ $guest != /run/farbus/* && $guest != / ]] || die "the guest's $guest is the lab's own"
    shipped[$guest]=$host
    if ! in_shipped_folder "$guest" "$host"; then
        mkdir -p "$stage${guest%/*}"
        [[ ! -e $stage$guest ]] || die "$guest is sent after files in it: give a folder before what goes into it"
        ln -s "$host" "$stage$guest"
    fi
    [[ ! -f $host ]] || ship_needs "$host"
}

# True if $1 lies in a folder that is sent, as the same file as $2 of the host. The stage has a link to that folder, and nothing may be
# put there: it would land in the host's.
in_shipped_folder() {
    local parent=$1
    while parent=${parent%/*} && [[ -n $parent ]]; do
        [[ -L $stage$parent ]] || continue
        [[ $stage$1 -ef $2 ]] || die "$1 lies in ${shipped[$parent]}, which is sent whole, and is not $2: send it to another place"
        return 0
    done
    return 1
}

# Ships what file $1 needs to run: the libraries of an ELF file, the interpreter of a script.
ship_needs() {
    local magic line word library version
    IFS= read -r -d '' -n 4 magic < <(head -c 4 "$1" | tr -d '\0') || true
    if [[ $magic == '#!'* ]]; then
        read -r line <"$1" || true
        read -ra line <<<"${line#??}"
        word=${line[0]}
        [[ ${word##*/} != env ]] || word=$(command -v "${line[1]}") || die "$1 wants ${line[1]}, which this host does not have"
        [[ ${word##*/} == sh ]] || ship "$word" "$word"
    fi
    [[ $magic == $'\x7fELF' ]] || return 0
    # The names of versions stand near the beginning of an ELF file.
    version=$(head -c 8M "$1" | grep -aoE 'GLIBC_2\.[0-9]+' | sed 's/.*\.//' | sort -n | tail -n1) || true
    ((${version:-0} <= needs_glibc)) || needs_glibc=$version
    # A static program has none, and ldd says so with a failure.
    while read -r line; do
        case $line in
        *'=> not found'*)
            library=${line%% *}
            grep -qxF "$library" "$FARBUS_LAB_LIBRARIES" ||
                die "$1 needs $library, which is neither on this host nor in the guest: install it, or send it with --file and set LD_LIBRARY_PATH with --env"
            ;;
        *'=> /'*)
            library=${line#*=> } library=${library% (*}
            grep -qxF "${library##*/}" "$FARBUS_LAB_LIBRARIES" || {
                ship "$library" "$library"
                in_library_path "${library%/*}"
            }
            ;;
        esac
    done < <(LC_ALL=C ldd "$1" 2>/dev/null || true)
}

library_path=''
# The guest's loader has no cache and looks into its own folder only.
in_library_path() {
    case $1 in /lib/x86_64-linux-gnu | /usr/lib/x86_64-linux-gnu) return ;; esac
    [[ :$library_path: == *":$1:"* ]] || library_path=${library_path:+$library_path:}$1
}

# Puts the host's C library over the guest's if something shipped needs a newer one. The guest's own programs run with it too.
newer_glibc() {
    local name path
    ((needs_glibc > ${FARBUS_LAB_GLIBC#2.})) || return 0
    say "the program wants glibc 2.$needs_glibc, the guest has $FARBUS_LAB_GLIBC: the host's goes with it"
    while read -r name path; do
        path=$(realpath "$path")
        mkdir -p "$stage/usr/lib/x86_64-linux-gnu" "$stage/usr/lib64"
        case $name in
        ld-linux-x86-64.so.2) ln -s "$path" "$stage/usr/lib64/$name" ;;
        *) ln -s "$path" "$stage/usr/lib/x86_64-linux-gnu/$name" ;;
        esac
    done < <(host_glibc)
    [[ -e $stage/usr/lib64/ld-linux-x86-64.so.2 ]] || die "this host's C library was not found"
}
# The files of the host's C library, as "name path", found through those of a program that surely uses it.
host_glibc() {
    local loader folder name
    folder=$(ldd "$BASH" | sed -n 's/.*libc\.so\.6 => \(.*\)\/libc\.so\.6 .*/\1/p')
    loader=$(ldd "$BASH" | sed -n 's/^\s*\(\/.*ld-linux-x86-64\.so\.2\) .*/\1/p')
    echo "ld-linux-x86-64.so.2 $loader"
    for name in libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libresolv.so.2 libutil.so.1 libanl.so.1; do
        [[ ! -e $folder/$name ]] || echo "$name $folder/$name"
    done
}

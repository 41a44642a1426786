# shellcheck shell=bash
# How the labs pack an initramfs: kernel modules with all that they depend on, and a folder as an archive. Sourced,
# never run. For example `pack_modules root/usr/lib/modules/6.1.0-56-amd64 busybox tree/modules rdma_rxe` copies ib_core.ko,
# udp_tunnel.ko and 4 more, and prints their names in the order in which they load.

# Copies into folder $3 the modules "${@:4}" (with _ or - in their names) of the kernel whose modules lie in $1, each after
# all that it depends on, and prints their names, one a line. What is built in needs nothing. $2 is a busybox, to decompress.
pack_modules() {
    local -A packed=()
    local module
    [[ -r $1/modules.builtin ]] || die "$1 does not say what kernel ${1##*/} has built in"
    for module in "${@:4}"; do
        add_module "$1" "$2" "$3" "$module"
    done
}

# One module $4 for pack_modules, whose `packed` holds what is done.
add_module() {
    local modules=$1 busybox=$2 to=$3 name=${4//-/_} file pattern dep
    [[ -z ${packed[$name]:-} ]] || return 0
    packed[$name]=1
    pattern=${name//_/[-_]}
    ! grep -qE "/$pattern\.ko$" "$modules/modules.builtin" || return 0
    file=$(find "$modules/kernel" -name "$pattern.ko*" | head -n1)
    [[ -n $file ]] || die "kernel ${modules##*/} has no module $name, neither built in nor as a file"
    case $file in
    *.xz) "$busybox" xzcat "$file" >"$to/$name.ko" ;;
    *.ko) cp "$file" "$to/$name.ko" ;;
    *) die "no way to decompress $file" ;;
    esac
    # A module names what it needs in its .modinfo section, as NUL-ended key=value strings.
    for dep in $(tr '\0' '\n' <"$to/$name.ko" | grep -a '^depends=' | head -n1 | cut -d= -f2 | tr ',' ' '); do
        add_module "$modules" "$busybox" "$to" "$dep"
    done
    echo "$name"
}

# Prints folder $1 as an initramfs, owned by root, the same bytes for the same files. $2 is a busybox, for its cpio.
pack_tree() {
    find "$1" -exec touch -h -d @0 {} +
    (cd "$1" && find . | LC_ALL=C sort | "$2" cpio -o -H newc -R 0:0 2>/dev/null) | gzip -9n
}

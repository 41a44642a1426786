//! Who may connect to the vfio-user socket: its mode and its group, from `--socket-mode` and `--socket-group`.
//!
//! `--socket-group kvm` makes the socket one of group kvm with mode 660, for a QEMU that runs as a user of that group.

use farbus_control::read::read_text;
use farbus_pci_shim::vfio_user::SocketAccess;

use crate::borrow_args::BorrowArgs;
use crate::failure::{Advise, misuse};

/// Where the groups of a host have their numbers (group(5)).
const GROUPS: &str = "/etc/group";

/// What the options ask for.
pub fn of(args: &BorrowArgs) -> anyhow::Result<SocketAccess> {
    let group = args.socket_group.as_deref().map(number).transpose()?;
    let mode = args.socket_mode.unwrap_or(if group.is_some() { 0o660 } else { 0o600 });
    Ok(SocketAccess { mode, group })
}

/// A group's number, by itself or by its name.
fn number(group: &str) -> anyhow::Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let hint = "name a group that `getent group` lists, by its number where it is not in /etc/group";
    let groups = read_text(GROUPS.as_ref()).advise(format!("cannot look for group {group} in {GROUPS}"), hint)?;
    find(&groups, group).ok_or_else(|| misuse(format!("{GROUPS} has no group {group:?}"), hint))
}

/// The number of `group` in the text of /etc/group: lines of `name:password:number:members`.
fn find(groups: &str, group: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        let groups = "root:x:0:\nkvm:x:106:qemu,libvirt\nbroken\nkv:x:many:\n";
        assert_eq!((find(groups, "kvm"), find(groups, "root")), (Some(106), Some(0)));
        for other in ["kv", "broken", "", "qemu", "vm"] {
            assert_eq!(find(groups, other), None, "{other}");
        }
        assert_eq!(number("4711").unwrap(), 4711);
    }
}

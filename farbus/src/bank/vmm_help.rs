//! What an operator types at a VMM around `farbus bank deposit` and `withdraw`, as their help shows it.
//!
//! `farbus bank withdraw --help` ends with the command line of a QEMU that resumes what was withdrawn: `-incoming file:/var/tmp/vm7.mig`.

/// Behind the options of `farbus bank deposit`.
pub const DEPOSIT: &str = "The files must not change meanwhile: pause the machine, or deposit a snapshot of it.

Without --dirty all of a section is read and hashed, and pages that are as at the last deposit are not stored again. With --dirty and --parent only pages whose
bit is set are read: the file holds 64-bit little-endian words, and bit j of word i is page 64 i + j (4 KiB). A bit that is wrongly clear is a
page that is not saved.

A deposit that was interrupted is resumed by running it again: the pages that it had stored are found.

QEMU 9 and newer saves a machine into one file; in its monitor:
  stop
  migrate_set_capability mapped-ram on
  migrate file:/var/tmp/vm7.mig
and then, here: farbus bank deposit BANK vm7 --qemu /var/tmp/vm7.mig --disk vm7.img

Any QEMU whose memory is a shared file (-object memory-backend-file,id=mem,size=4G,mem-path=/dev/shm/vm7,share=on -machine memory-backend=mem)
saves the rest beside it; in its monitor:
  stop
  migrate_set_capability x-ignore-shared on
  migrate \"exec:cat >/var/tmp/vm7.dev\"
and then, while it is stopped: farbus bank deposit BANK vm7 --memory /dev/shm/vm7 --device-state /var/tmp/vm7.dev --disk vm7.img

Cloud Hypervisor with --memory shared=on hands its machine over, and ends:
  farbus bank deposit BANK vm7 --cloud-hypervisor /run/vm7.save --disk vm7.img
  ch-remote --api-socket API pause
  ch-remote --api-socket API send-migration destination_url=unix:/run/vm7.save,local=on";

/// Behind the options of `farbus bank withdraw`.
pub const WITHDRAW: &str = "Files are written as FILE.farbus-part, and get their names when all of all of them is there. A withdrawal that was interrupted at any instant is resumed by
running it again. No file that is there is touched without --replace.

A machine that was deposited with --qemu comes out with --qemu, and QEMU, started as it was with what it had, goes on with it:
  farbus bank withdraw BANK vm7 --qemu /var/tmp/vm7.mig --section disk0=vm7.img
  qemu-system-x86_64 … -global migration.mapped-ram=on -incoming file:/var/tmp/vm7.mig

One whose memory was a shared file:
  farbus bank withdraw BANK vm7 --section memory=/dev/shm/vm7 --section devices=/var/tmp/vm7.dev --section disk0=vm7.img
  qemu-system-x86_64 … -incoming defer
and in its monitor: migrate_set_capability x-ignore-shared on, and migrate_incoming \"exec:cat /var/tmp/vm7.dev\"

Either was saved while it was stopped, and waits for cont in its monitor.

One that Cloud Hypervisor had handed over, to another one:
  ch-remote --api-socket API receive-migration receiver_url=unix:/run/vm7.restore,memory_mode=postcopy
  farbus bank withdraw BANK vm7 --cloud-hypervisor /run/vm7.restore --on-demand --resume";

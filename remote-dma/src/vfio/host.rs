//! What this host says of its PCI devices, and what stands in the way of lending one, with the commands that remove it.
//!
//! 0000:03:00.0 with the driver `nvme` is in IOMMU group 10 alone: nothing is missing but vfio-pci, and the three `echo` lines that give it
//! the device are in the [`Obstacle`]'s text. All of it is read from sysfs; nothing is opened or changed.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

/// The driver that lets a process have a PCI device (Linux, Documentation/driver-api/vfio.rst).
const VFIO_PCI: &str = "vfio-pci";
/// Drivers that do no DMA for the host, so that their devices may share a group with a lent one (Linux, drivers/vfio: `vfio_dev_driver_allowed`).
const HARMLESS: [&str; 3] = ["vfio-pci", "pci-stub", "pcieport"];
/// Base class and subclass of PCI-to-PCI bridges and of host bridges are below this base class (PCI Code and ID Assignment, section 1.7).
const BRIDGE_CLASS: u32 = 0x06;

/// Where a PCI function is: `0000:03:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Segment.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

/// A text that is no [`PciAddress`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no PCI address: use DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal, as in 0000:03:00.0")]
pub struct NoAddress(pub String);

impl FromStr for PciAddress {
    type Err = NoAddress;

    /// With or without the domain, as `lspci` prints it.
    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
            let number = |digits: &str, at_most: usize| {
                let good = (1..=at_most).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
                good.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
            };
            let address = Self {
                domain: number(domain, 8)?,
                bus: u8::try_from(number(bus, 2)?).ok()?,
                device: u8::try_from(number(device, 2)?).ok()?,
                function: u8::try_from(number(function, 1)?).ok()?,
            };
            (address.device < 32 && address.function < 8).then_some(address)
        };
        parse().ok_or_else(|| NoAddress(text.to_owned()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// What stands in the way of lending a device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Obstacle {
    /// Nothing is there.
    #[error("there is no PCI device {0}")]
    Absent(PciAddress),
    /// Bridges are part of the host.
    #[error("{0} is a bridge")]
    Bridge(PciAddress),
    /// Nothing keeps its DMA within the borrower's memory.
    #[error("{0} is behind no IOMMU, so its DMA could reach all of this host")]
    NoIommu(PciAddress),
    /// vfio-pci is not there.
    #[error("the kernel has no driver vfio-pci loaded")]
    NoDriver,
    /// Another driver has it, or none.
    #[error("{address} is bound to {}, not to vfio-pci", driver.as_deref().unwrap_or("no driver"))]
    Unbound {
        /// The device.
        address: PciAddress,
        /// Who has it.
        driver: Option<String>,
    },
    /// Another driver has a device that the IOMMU cannot tell from it.
    #[error("{neighbour} is in the same IOMMU group, {group}, and the host uses it (driver {driver})")]
    NotViable {
        /// The group.
        group: u32,
        /// The other device.
        neighbour: PciAddress,
        /// Who has that.
        driver: String,
    },
    /// This user may not open the group, or the container.
    #[error("this user may not open {}", .0.display())]
    Permission(PathBuf),
    /// The kernel made no file for the group, or for containers.
    #[error("there is no {}", .0.display())]
    NoNode(PathBuf),
    /// sysfs does not say what it should.
    #[error("cannot read {}: {why}", path.display())]
    Sysfs {
        /// What was read.
        path: PathBuf,
        /// Why it could not be.
        why: String,
    },
}

impl Obstacle {
    /// What to do about it; commands for a root shell, one a line.
    pub fn remedy(&self) -> String {
        match self {
            Self::Absent(_) => "`farbus devices` lists those of this host".to_owned(),
            Self::Bridge(_) => "lend the device behind it; `farbus devices` lists those of this host".to_owned(),
            Self::NoIommu(_) => {
                "switch the IOMMU on (VT-d or AMD-Vi) in the firmware, add intel_iommu=on or amd_iommu=on to the kernel's command line, and boot \
                 again"
                    .to_owned()
            }
            Self::NoDriver | Self::NoNode(_) => "modprobe -a vfio-pci vfio_iommu_type1".to_owned(),
            Self::Unbound { address, driver } => bind(*address, driver.is_some()),
            Self::NotViable { neighbour, .. } => {
                format!("give up that device too, if the host can do without it:\n{}", bind(*neighbour, true))
            }
            Self::Permission(path) => format!("run as root, or: chown $USER {}", path.display()),
            Self::Sysfs { .. } => "mount -t sysfs sysfs /sys".to_owned(),
        }
    }
}

/// The commands that give a device to vfio-pci.
fn bind(address: PciAddress, bound: bool) -> String {
    let device = format!("/sys/bus/pci/devices/{address}");
    let unbind = if bound { format!("echo {address} > {device}/driver/unbind\n") } else { String::new() };
    format!("echo vfio-pci > {device}/driver_override\n{unbind}echo {address} > /sys/bus/pci/drivers_probe")
}

/// A device of this host, and what is missing to lend it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Where it is.
    pub address: PciAddress,
    /// Configuration space 0x00.
    pub vendor_id: u16,
    /// Configuration space 0x02.
    pub device_id: u16,
    /// Configuration space 0x09, 24 bits.
    pub class_code: u32,
    /// Its driver.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// What is missing, in the order in which to mend it; empty: it can be lent.
    pub obstacles: Vec<Obstacle>,
}

/// Where the kernel shows its devices; other places are for tests.
#[derive(Clone, Debug)]
pub struct Host {
    sys: PathBuf,
    dev: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into() }
    }
}

impl Host {
    /// With sysfs at `sys` and devices at `dev`.
    pub fn at(sys: impl Into<PathBuf>, dev: impl Into<PathBuf>) -> Self {
        Self { sys: sys.into(), dev: dev.into() }
    }

    /// All devices but bridges, by address. Empty where there is no PCI bus.
    ///
    /// # Errors
    /// [`Obstacle::Sysfs`].
    pub fn candidates(&self) -> Result<Vec<Candidate>, Obstacle> {
        let devices = self.sys.join("bus/pci/devices");
        let entries = match fs::read_dir(&devices) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(unreadable(&devices)(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(unreadable(&devices))?;
            let Ok(address) = entry.file_name().to_string_lossy().parse() else { continue };
            let candidate = self.look(address)?;
            if candidate.class_code >> 16 != BRIDGE_CLASS {
                found.push(candidate);
            }
        }
        found.sort_by_key(|candidate| candidate.address);
        Ok(found)
    }

    /// One device.
    ///
    /// # Errors
    /// [`Obstacle::Absent`], [`Obstacle::Sysfs`].
    pub fn look(&self, address: PciAddress) -> Result<Candidate, Obstacle> {
        let folder = self.folder(address);
        if !folder.exists() {
            return Err(Obstacle::Absent(address));
        }
        let driver = link_name(&folder.join("driver"))?;
        let group = link_name(&folder.join("iommu_group"))?.and_then(|name| name.parse().ok());
        let mut candidate = Candidate {
            address,
            vendor_id: number(&folder.join("vendor"))? as u16,
            device_id: number(&folder.join("device"))? as u16,
            class_code: number(&folder.join("class"))? & 0xff_ffff,
            driver,
            group,
            obstacles: Vec::new(),
        };
        candidate.obstacles = self.obstacles(&candidate)?;
        Ok(candidate)
    }

    /// The folder of a device.
    pub fn folder(&self, address: PciAddress) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }

    fn obstacles(&self, candidate: &Candidate) -> Result<Vec<Obstacle>, Obstacle> {
        let address = candidate.address;
        let mut obstacles = Vec::new();
        if candidate.class_code >> 16 == BRIDGE_CLASS {
            return Ok(vec![Obstacle::Bridge(address)]);
        }
        let Some(group) = candidate.group.filter(|group| !self.is_unprotected(*group)) else {
            return Ok(vec![Obstacle::NoIommu(address)]);
        };
        if !self.sys.join("bus/pci/drivers").join(VFIO_PCI).exists() {
            obstacles.push(Obstacle::NoDriver);
        }
        if candidate.driver.as_deref() != Some(VFIO_PCI) {
            obstacles.push(Obstacle::Unbound { address, driver: candidate.driver.clone() });
        }
        obstacles.extend(self.neighbours(address, group)?);
        if obstacles.is_empty() {
            let nodes = [self.dev.join("vfio/vfio"), self.dev.join("vfio").join(group.to_string())];
            obstacles.extend(nodes.into_iter().find_map(may_not_open));
        }
        Ok(obstacles)
    }

    /// Whether VFIO made the group itself, because there is no IOMMU (`enable_unsafe_noiommu_mode`).
    fn is_unprotected(&self, group: u32) -> bool {
        let name = self.sys.join(format!("kernel/iommu_groups/{group}/name"));
        fs::read_to_string(name).is_ok_and(|name| name.trim() == "vfio-noiommu")
    }

    fn neighbours(&self, address: PciAddress, group: u32) -> Result<Vec<Obstacle>, Obstacle> {
        let folder = self.sys.join(format!("kernel/iommu_groups/{group}/devices"));
        let mut obstacles = Vec::new();
        for entry in fs::read_dir(&folder).map_err(unreadable(&folder))? {
            let entry = entry.map_err(unreadable(&folder))?;
            let Ok(neighbour) = entry.file_name().to_string_lossy().parse::<PciAddress>() else { continue };
            if neighbour == address {
                continue;
            }
            let folder = self.folder(neighbour);
            let bridge = number(&folder.join("class"))? >> 16 == BRIDGE_CLASS;
            let driver = link_name(&folder.join("driver"))?;
            if let Some(driver) = driver.filter(|driver| !bridge && !HARMLESS.contains(&driver.as_str())) {
                obstacles.push(Obstacle::NotViable { group, neighbour, driver });
            }
        }
        obstacles.sort_by_key(ToString::to_string);
        Ok(obstacles)
    }
}

fn may_not_open(node: PathBuf) -> Option<Obstacle> {
    match rustix::fs::access(&node, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK) {
        Ok(()) => None,
        Err(rustix::io::Errno::NOENT) => Some(Obstacle::NoNode(node)),
        Err(_) => Some(Obstacle::Permission(node)),
    }
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> Obstacle {
    let path = path.to_owned();
    move |error| Obstacle::Sysfs { path, why: error.to_string() }
}

/// The last name of what a link leads to; `None` where there is no link.
fn link_name(link: &Path) -> Result<Option<String>, Obstacle> {
    match fs::read_link(link) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(link)(error)),
    }
}

/// A file with a number as 0x1234.
fn number(path: &Path) -> Result<u32, Obstacle> {
    let text = fs::read_to_string(path).map_err(unreadable(path))?;
    let text = text.trim();
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u32::from_str_radix(digits, 16).map_err(|error| Obstacle::Sysfs { path: path.to_owned(), why: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A sysfs of two devices and a bridge, as the kernel shows them.
    struct Made(tempfile::TempDir);

    impl Made {
        fn new() -> Self {
            let made = Self(tempfile::tempdir().unwrap());
            for folder in ["sys/bus/pci/drivers/vfio-pci", "sys/bus/pci/drivers/nvme", "sys/bus/pci/devices", "dev/vfio"] {
                fs::create_dir_all(made.0.path().join(folder)).unwrap();
            }
            fs::write(made.0.path().join("dev/vfio/vfio"), "").unwrap();
            made
        }

        fn device(&self, address: &str, class: &str, group: Option<u32>, driver: Option<&str>) -> &Self {
            let folder = self.0.path().join("sys/bus/pci/devices").join(address);
            fs::create_dir_all(&folder).unwrap();
            for (name, text) in [("vendor", "0x1b36\n"), ("device", "0x0010\n"), ("class", class)] {
                fs::write(folder.join(name), text).unwrap();
            }
            if let Some(driver) = driver {
                symlink(format!("../../drivers/{driver}"), folder.join("driver")).unwrap();
            }
            if let Some(group) = group {
                symlink(format!("../../../kernel/iommu_groups/{group}"), folder.join("iommu_group")).unwrap();
                let members = self.0.path().join(format!("sys/kernel/iommu_groups/{group}/devices"));
                fs::create_dir_all(&members).unwrap();
                symlink(&folder, members.join(address)).unwrap();
                fs::write(self.0.path().join(format!("dev/vfio/{group}")), "").unwrap();
            }
            self
        }

        fn obstacles(&self, address: &str) -> Vec<Obstacle> {
            let host = Host::at(self.0.path().join("sys"), self.0.path().join("dev"));
            host.look(address.parse().unwrap()).map_or_else(|obstacle| vec![obstacle], |candidate| candidate.obstacles)
        }
    }

    #[test]
    fn addresses_parse_with_and_without_a_domain_and_nothing_else_does() {
        let address = PciAddress { domain: 0, bus: 3, device: 0x1f, function: 7 };
        assert_eq!("0000:03:1f.7".parse(), Ok(address));
        assert_eq!("03:1f.7".parse(), Ok(address));
        assert_eq!(address.to_string(), "0000:03:1f.7");
        assert_eq!("10000:e1:00.0".parse::<PciAddress>().unwrap().domain, 0x1_0000);
        for wrong in
            ["", "03:00", "0000:03:20.0", "0000:03:00.8", "0000:103:00.0", "0000:03:00.", "x:03:00.0", "../etc:0.0", "+3:00.0"]
        {
            assert_eq!(wrong.parse::<PciAddress>(), Err(NoAddress(wrong.to_owned())));
        }
    }

    #[test]
    fn a_device_that_vfio_has_alone_in_its_group_can_be_lent() {
        let made = Made::new();
        made.device("0000:03:00.0", "0x010802\n", Some(10), Some("vfio-pci"));
        assert_eq!(made.obstacles("0000:03:00.0"), []);
    }

    #[test]
    fn a_device_of_another_driver_is_told_with_the_commands_that_free_it() {
        let made = Made::new();
        made.device("0000:03:00.0", "0x010802\n", Some(10), Some("nvme")).device("0000:04:00.0", "0x010802\n", Some(11), None);
        let [bound] = &made.obstacles("0000:03:00.0")[..] else { panic!() };
        assert_eq!(bound.to_string(), "0000:03:00.0 is bound to nvme, not to vfio-pci");
        assert_eq!(
            bound.remedy(),
            "echo vfio-pci > /sys/bus/pci/devices/0000:03:00.0/driver_override\n\
             echo 0000:03:00.0 > /sys/bus/pci/devices/0000:03:00.0/driver/unbind\n\
             echo 0000:03:00.0 > /sys/bus/pci/drivers_probe"
        );
        let [unbound] = &made.obstacles("0000:04:00.0")[..] else { panic!() };
        assert_eq!(unbound.to_string(), "0000:04:00.0 is bound to no driver, not to vfio-pci");
        assert!(!unbound.remedy().contains("unbind"));
    }

    #[test]
    fn a_device_without_an_iommu_is_not_lent_whatever_has_it() {
        let made = Made::new();
        made.device("0000:03:00.0", "0x010802\n", None, Some("vfio-pci")).device(
            "0000:04:00.0",
            "0x010802\n",
            Some(0),
            Some("vfio-pci"),
        );
        fs::write(made.0.path().join("sys/kernel/iommu_groups/0/name"), "vfio-noiommu\n").unwrap();
        for address in ["0000:03:00.0", "0000:04:00.0"] {
            assert_eq!(made.obstacles(address), [Obstacle::NoIommu(address.parse().unwrap())]);
        }
    }

    #[test]
    fn a_neighbour_that_the_host_uses_makes_a_group_not_viable() {
        let made = Made::new();
        made.device("0000:03:00.0", "0x010802\n", Some(10), Some("vfio-pci"))
            .device("0000:03:00.1", "0x020000\n", Some(10), Some("e1000e"))
            .device("0000:03:00.2", "0x020000\n", Some(10), None)
            .device("0000:02:00.0", "0x060400\n", Some(10), Some("shpchp"));
        let neighbour = "0000:03:00.1".parse().unwrap();
        assert_eq!(made.obstacles("0000:03:00.0"), [Obstacle::NotViable { group: 10, neighbour, driver: "e1000e".to_owned() }]);
    }

    #[test]
    fn what_is_not_there_is_said_to_be_missing() {
        let made = Made::new();
        made.device("0000:02:00.0", "0x060400\n", Some(10), Some("pcieport")).device(
            "0000:03:00.0",
            "0x010802\n",
            Some(11),
            Some("vfio-pci"),
        );
        assert_eq!(made.obstacles("0000:09:00.0"), [Obstacle::Absent("0000:09:00.0".parse().unwrap())]);
        assert_eq!(made.obstacles("0000:02:00.0"), [Obstacle::Bridge("0000:02:00.0".parse().unwrap())]);
        let group = made.0.path().join("dev/vfio/11");
        fs::remove_file(&group).unwrap();
        assert_eq!(made.obstacles("0000:03:00.0"), [Obstacle::NoNode(group)]);
        fs::remove_dir(made.0.path().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
        assert_eq!(made.obstacles("0000:03:00.0"), [Obstacle::NoDriver]);
        let host = Host::at(made.0.path().join("nowhere"), made.0.path());
        assert!(host.candidates().unwrap().is_empty());
    }
}

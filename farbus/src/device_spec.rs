//! What `--device` names, and how it is opened.
//!
//! `nvme:disk.img,ro,latency=80us` is a read-only NVMe controller over disk.img whose commands take at least 80 us; `vfio-user:/run/dev.sock` is
//! whatever device the vfio-user server at that socket has.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use farbus_pci_shim::vfio_user::{BackendOptions, OpenError, VfioUserBackend};
use farbus_remote_dma::Backend;
use farbus_remote_dma::model::edu::Edu;
use farbus_remote_dma::model::nvme::media::MediaError;
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
#[cfg(feature = "vfio")]
use farbus_remote_dma::vfio::{NoAddress, PciAddress};
use thiserror::Error;

use crate::failure::Advise;
use crate::values::parse_duration;
#[cfg(feature = "vfio")]
use crate::vfio;

/// What `farbus lend --help` says of devices.
pub const HELP: &str = "Devices:
  nvme:FILE[,ro][,latency=80us][,serial=TEXT]
                an NVMe 1.4 controller over an image file or a block device
  edu           the register file and DMA engine of QEMU's edu device
  vfio:ADDRESS  a PCI device of this host that vfio-pci has, as it is: vfio:0000:03:00.0. It reaches its borrower's memory through this host's
                IOMMU, so its borrower is on this host (shm:); `farbus devices` lists what can be lent, and what is missing for the rest
  vfio-user:SOCKET[,messages][,map-unsealed]
                the device of the vfio-user server at that socket. If the server goes, its borrower sees a dead device, and it is lent again
                when the server is back. Over shared memory the server is given the guest's memory where that is known to be shared;
                messages: never, so that each DMA is a message, and the dirty log is exact. map-unsealed: use registers that the server
                shares in a file that it could shorten, which would end this process

Examples:
  farbus lend --device nvme:disk.img --listen shm:/tmp/farbus.link
  farbus lend --device vfio:0000:03:00.0 --listen shm:/tmp/farbus.link
  farbus lend --device vfio-user:/run/dev.sock --listen shm:/tmp/farbus.link
  farbus lend --device nvme:disk.img --listen rdma:0.0.0.0:7000,dev=mlx5_0 --tls lab/lender/nas --allow vm7";

/// A device that can be lent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// An NVMe controller over a file or block device.
    Nvme {
        /// The image.
        path: PathBuf,
        /// How it is lent.
        options: NvmeOptions,
    },
    /// QEMU's edu device.
    Edu,
    /// The device of a vfio-user server.
    VfioUser {
        /// Its socket.
        path: PathBuf,
        /// How it is treated.
        options: BackendOptions,
    },
    /// A PCI device of this host.
    #[cfg(feature = "vfio")]
    Vfio(PciAddress),
}

/// Why a text names no device.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// No such kind.
    #[error("{0:?} is no device: use nvme:FILE[,ro][,latency=80us][,serial=TEXT], edu, vfio:ADDRESS or vfio-user:SOCKET")]
    Kind(String),
    /// The socket is missing.
    #[error("vfio-user: needs a server's socket, as in vfio-user:/run/dev.sock")]
    NoSocket,
    /// No address of a PCI device.
    #[cfg(feature = "vfio")]
    #[error("vfio: {0}")]
    Address(#[from] NoAddress),
    /// The image is missing.
    #[error("nvme: needs an image, as in nvme:disk.img")]
    NoImage,
    /// No such option.
    #[error("{0:?} is no option of nvme: use ro, latency=TIME or serial=TEXT (an image's path may have no comma)")]
    Option(String),
    /// No such option of a vfio-user device.
    #[error("{0:?} is no option of vfio-user: use messages or map-unsealed (a socket's path may have no comma)")]
    ServerOption(String),
    /// The option's value is wrong.
    #[error("{option}: {why}")]
    Value {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl FromStr for DeviceSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text == "edu" {
            return Ok(Self::Edu);
        }
        #[cfg(feature = "vfio")]
        if let Some(address) = text.strip_prefix("vfio:") {
            return Ok(Self::Vfio(address.parse()?));
        }
        let rest = match text.split_once(':') {
            Some(("nvme", rest)) => rest,
            Some(("vfio-user", rest)) => return vfio_user(rest),
            _ => return Err(SpecError::Kind(text.to_owned())),
        };
        let mut parts = rest.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(SpecError::NoImage)?;
        let mut options = NvmeOptions::default();
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => options.read_only = true,
                Some(("latency", value)) => {
                    options.latency = parse_duration(value).map_err(|why| SpecError::Value { option: "latency", why })?;
                }
                Some(("serial", value)) if (1..=20).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                    options.serial = Some(value.to_owned());
                }
                Some(("serial", _)) => {
                    return Err(SpecError::Value {
                        option: "serial",
                        why: "use 1 to 20 printable ASCII characters, without spaces".to_owned(),
                    });
                }
                _ => return Err(SpecError::Option(part.to_owned())),
            }
        }
        Ok(Self::Nvme { path: path.into(), options })
    }
}

fn vfio_user(text: &str) -> Result<DeviceSpec, SpecError> {
    let mut parts = text.split(',');
    let path = parts.next().filter(|path| !path.is_empty()).ok_or(SpecError::NoSocket)?;
    let mut options = BackendOptions::default();
    for part in parts {
        match part {
            "map-unsealed" => options.map_unsealed = true,
            "messages" => options.share_memory = false,
            _ => return Err(SpecError::ServerOption(part.to_owned())),
        }
    }
    Ok(DeviceSpec::VfioUser { path: path.into(), options })
}

impl DeviceSpec {
    /// Opens the device.
    pub fn open(&self) -> anyhow::Result<Box<dyn Backend>> {
        match self {
            Self::Edu => Ok(Box::new(Edu::new().context("cannot make the edu device")?)),
            Self::VfioUser { path, options } => match VfioUserBackend::open(path, *options) {
                Ok(device) => Ok(Box::new(device)),
                Err(error) => {
                    let hint = server_advice(&error);
                    let what = format!("cannot lend the device at {}", path.display());
                    match hint {
                        Some(hint) => Err(error).advise(what, hint),
                        None => Err(error).context(what),
                    }
                }
            },
            Self::Nvme { path, options } => {
                let nvme = Nvme::open(path, options.clone()).or_else(|error| {
                    let what = format!("cannot lend {}", path.display());
                    if !options.read_only && is_read_only(&error) {
                        Err(error).advise(what, format!("lend it read-only: nvme:{},ro", path.display()))
                    } else {
                        Err(error).context(what)
                    }
                })?;
                Ok(Box::new(nvme))
            }
            #[cfg(feature = "vfio")]
            Self::Vfio(address) => Ok(Box::new(vfio::open(*address)?)),
        }
    }
}

/// What to do about a vfio-user server whose device cannot be lent; `None` where the error says all there is.
fn server_advice(error: &OpenError) -> Option<&'static str> {
    Some(match error {
        OpenError::Connect(source) => match source.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => "is the server of the device running, and does it listen there?",
            ErrorKind::PermissionDenied => "run this as a user who may write to that socket",
            ErrorKind::WouldBlock => "the server lets nobody in: end its other client, or look at the server",
            _ => return None,
        },
        OpenError::Asked { source, .. } if source.errno() == Some(rustix::io::Errno::BUSY) => {
            "a virtual machine, or another lender, has the device: end that first"
        }
        OpenError::Asked { .. } => "look at the server: it may be stopped, have another client, or be no vfio-user server",
        OpenError::Server(_) | OpenError::Unfit(_) | OpenError::Describe(_) => "it is the server of the device that must be mended",
        OpenError::Host { .. } => "raise the limit of open files: ulimit -n 4096",
        _ => return None,
    })
}

/// Whether an image could not be opened because this user or its file system does not let it be written.
fn is_read_only(error: &MediaError) -> bool {
    let MediaError::Host { what: "open", source, .. } = error else { return false };
    matches!(source.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_image_that_may_not_be_written_can_be_lent_read_only() {
        let error = |what, kind: ErrorKind| MediaError::Host { what, path: "disk.img".into(), source: kind.into() };
        assert!(is_read_only(&error("open", ErrorKind::ReadOnlyFilesystem)));
        assert!(is_read_only(&error("open", ErrorKind::PermissionDenied)));
        assert!(!is_read_only(&error("open", ErrorKind::NotFound)) && !is_read_only(&error("lock", ErrorKind::PermissionDenied)));
    }

    #[test]
    fn specs_parse_or_say_what_is_allowed() {
        let slow = NvmeOptions { read_only: true, latency: Duration::from_micros(80), ..NvmeOptions::default() };
        assert_eq!("nvme:a.img,ro,latency=80us".parse(), Ok(DeviceSpec::Nvme { path: "a.img".into(), options: slow }));
        assert_eq!("edu".parse(), Ok(DeviceSpec::Edu));
        assert_eq!("nvme:".parse::<DeviceSpec>(), Err(SpecError::NoImage));
        let options = BackendOptions { map_unsealed: true, ..BackendOptions::default() };
        assert_eq!("vfio-user:/a,map-unsealed".parse(), Ok(DeviceSpec::VfioUser { path: "/a".into(), options }));
        assert_eq!("vfio-user:".parse::<DeviceSpec>(), Err(SpecError::NoSocket));
        assert_eq!("vfio-user:/a,ro".parse::<DeviceSpec>(), Err(SpecError::ServerOption("ro".into())));
        #[cfg(feature = "vfio")]
        assert_eq!("vfio:03:00.0".parse(), Ok(DeviceSpec::Vfio("0000:03:00.0".parse().unwrap())));
        for wrong in ["", "floppy:a", "nvme", "nvme:a,rw", "nvme:a,latency=80", "nvme:a,serial=", "edu:x", "vfio:", "vfio:nvme0"] {
            let parsed = wrong.parse::<DeviceSpec>();
            assert!(parsed.is_err(), "{wrong}: {parsed:?}");
        }
    }
}

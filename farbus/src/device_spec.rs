//! What `--device` names, and how it is opened.
//!
//! `nvme:disk.img,ro,latency=80us` is a read-only NVMe controller over disk.img whose commands take at least 80 us.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
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

Examples:
  farbus lend --device nvme:disk.img --listen shm:/tmp/farbus.link
  farbus lend --device vfio:0000:03:00.0 --listen shm:/tmp/farbus.link
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
    /// A PCI device of this host.
    #[cfg(feature = "vfio")]
    Vfio(PciAddress),
}

/// Why a text names no device.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// No such kind.
    #[error("{0:?} is no device: use nvme:FILE[,ro][,latency=80us][,serial=TEXT], edu or vfio:ADDRESS")]
    Kind(String),
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
        let Some(("nvme", rest)) = text.split_once(':') else { return Err(SpecError::Kind(text.to_owned())) };
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

impl DeviceSpec {
    /// Opens the device.
    pub fn open(&self) -> anyhow::Result<Box<dyn Backend>> {
        match self {
            Self::Edu => Ok(Box::new(Edu::new().context("cannot make the edu device")?)),
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
        #[cfg(feature = "vfio")]
        assert_eq!("vfio:03:00.0".parse(), Ok(DeviceSpec::Vfio("0000:03:00.0".parse().unwrap())));
        for wrong in ["", "floppy:a", "nvme", "nvme:a,rw", "nvme:a,latency=80", "nvme:a,serial=", "edu:x", "vfio:", "vfio:nvme0"] {
            let parsed = wrong.parse::<DeviceSpec>();
            assert!(parsed.is_err(), "{wrong}: {parsed:?}");
        }
    }
}

//! What each command does: a parsed request against the function, the maps and the interrupts of one client.
//!
//! `RegionRead { offset: 0x1c, region: 0, count: 4 }` reads BAR0 + 0x1c and leaves 20 bytes as the reply's body; the same with count 3 is
//! `EINVAL`, because no access to a BAR has three bytes.

use std::os::fd::OwnedFd;

use farbus_remote_dma::{BarAddress, ResetKind, Width};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::held::Until;
use super::message::Request;
use super::options::ClientEnd;
use super::served::Served;
use super::session::Session;
use super::version::agree;
use super::wire::{
    BAR_REGIONS, CONFIG_BYTES, CONFIG_REGION, DEVICE_PCI, DEVICE_RESETS, DeviceInfo, DmaUnmap, IRQ_INDEXES, REGION_READ,
    REGION_WRITE, REGIONS, RegionAccess, RegionInfo, RegionIoFds,
};

/// What a reply says about guest memory, and so must wait for.
pub(super) struct Promise {
    pub(super) until: Until,
    /// What is said where it cannot be kept; `None` for the reply all the same.
    pub(super) otherwise: Option<Errno>,
}

impl<D: Served> Session<'_, D> {
    /// Does what a request says; the reply's body is in `self.reply` afterwards, to be sent when its promise holds.
    ///
    /// # Errors
    /// The errno for the client.
    pub(super) fn dispatch(&mut self, request: &Request<'_>, fds: Vec<OwnedFd>) -> Result<Option<Promise>, Errno> {
        match *request {
            Request::RegionRead(access) => {
                self.region_read(access)?;
                // An answer from a device follows its stores.
                self.mediator.collect(self.device);
                let flushed = Promise { until: Until::Stored(self.mediator.stores().0), otherwise: None };
                return Ok((access.region < BAR_REGIONS).then_some(flushed));
            }
            Request::RegionWrite(access, data) => {
                let resets = self.device.resets();
                self.region_write(access, data)?;
                self.reply.extend_from_slice(access.as_bytes());
                return Ok(self.after_resets(resets));
            }
            Request::RegionWriteMulti(writes) => {
                let (mut done, resets) = (0_u64, self.device.resets());
                for (access, data) in writes.iter() {
                    let written =
                        data.get(..access.count as usize).ok_or(Errno::INVAL).and_then(|data| self.region_write(access, data));
                    match written {
                        Ok(()) => done += 1,
                        Err(errno) if done == 0 => return Err(errno),
                        Err(_) => break,
                    }
                }
                self.reply.extend_from_slice(done.as_bytes());
                return Ok(self.after_resets(resets));
            }
            Request::Version { major, minor, data } => self.version(major, minor, data),
            Request::DmaMap(map) => self.maps.map(self.device, &map, fds),
            Request::DmaUnmap(unmap) => return self.unmap(&unmap).map(Some),
            Request::DeviceInfo => {
                let info = DeviceInfo {
                    argsz: size_of::<DeviceInfo>() as u32,
                    flags: DEVICE_RESETS | DEVICE_PCI,
                    num_regions: REGIONS,
                    num_irqs: IRQ_INDEXES,
                };
                self.reply.extend_from_slice(info.as_bytes());
                Ok(())
            }
            Request::RegionInfo { index } => {
                let size = self.region_size(index)?;
                let info = RegionInfo {
                    argsz: size_of::<RegionInfo>() as u32,
                    flags: if size > 0 { REGION_READ | REGION_WRITE } else { 0 },
                    index,
                    cap_offset: 0,
                    size,
                    offset: 0,
                };
                self.reply.extend_from_slice(info.as_bytes());
                Ok(())
            }
            Request::RegionIoFds { index } => {
                self.region_size(index)?;
                // No part of a region has a descriptor of its own.
                let fds = RegionIoFds { argsz: size_of::<RegionIoFds>() as u32, flags: 0, index, count: 0 };
                self.reply.extend_from_slice(fds.as_bytes());
                Ok(())
            }
            Request::IrqInfo { index } => {
                let info = self.device.interrupts().info(index).ok_or(Errno::INVAL)?;
                self.reply.extend_from_slice(info.as_bytes());
                Ok(())
            }
            Request::SetIrqs(set) => {
                self.device.interrupts().set(&set, fds)?;
                let mode = self.device.interrupts().mode();
                if mode != self.mode {
                    self.mode = mode;
                    self.device.set_client_interrupts(mode);
                }
                Ok(())
            }
            Request::DeviceReset => {
                self.mediator.fault_all(self.device);
                let outcome = self.device.reset(ResetKind::Conventional);
                self.mediator.fault_all(self.device);
                self.device.interrupts().clear();
                outcome.map_err(|error| {
                    tracing::warn!(%error, "the device cannot be reset");
                    Errno::IO
                })?;
                return Ok(Some(Promise { until: Until::Quiet, otherwise: Some(Errno::TIMEDOUT) }));
            }
            // As the kernel answers for a feature that a device does not have: no migration, no dirty logging by IOVA.
            Request::DeviceFeature { .. } | Request::MigrationData => Err(Errno::NOTTY),
        }
        .map(|()| None)
    }

    /// After writes that may have been a function level reset: what was asked of the client before is given up. A guest may use the function
    /// 100 ms after it asked for the reset (PCIe 5.0, section 6.6.2), so the reply promises no more than it can.
    fn after_resets(&mut self, before: u64) -> Option<Promise> {
        if self.device.resets() == before {
            return None;
        }
        self.mediator.fault_all(self.device);
        Some(Promise { until: Until::Quiet, otherwise: None })
    }

    fn version(&mut self, major: u16, minor: u16, data: &[u8]) -> Result<(), Errno> {
        if self.agreed {
            return Err(Errno::INVAL);
        }
        let agreed = agree(major, minor, data);
        let (agreement, text) = agreed.inspect_err(|_| self.end = Some(ClientEnd::Misbehaved("no version could be agreed on")))?;
        self.agreed = true;
        tracing::info!(minor = agreement.minor, "a client is served");
        // Here and not where migration begins: QEMU (11.1.3) never asks for DEVICE_FEATURE, so that we do not hear of it.
        self.told.no_migration.call_once(|| {
            tracing::warn!(
                "do not migrate the virtual machine: stock QEMU (11.1.3) moves it without the state of this device, and without a word"
            );
        });
        self.mediator.set_max_data(agreement.client_max_data);
        self.reply.extend_from_slice([major, agreement.minor].as_bytes());
        self.reply.extend_from_slice(&text);
        Ok(())
    }

    fn unmap(&mut self, unmap: &DmaUnmap) -> Result<Promise, Errno> {
        let windows = self.maps.range_to_unmap(unmap)?;
        let unmapped = self.maps.unmap(self.device, &windows);
        // What the device asked for until then is given up, also where it does not let go of all.
        self.mediator.collect(self.device);
        for (iova, len) in &windows {
            self.mediator.fault_range(self.device, *iova, *len);
        }
        unmapped?;
        self.reply.extend_from_slice(unmap.as_bytes());
        Ok(Promise { until: Until::QuietIn(windows), otherwise: Some(Errno::TIMEDOUT) })
    }

    fn region_size(&self, index: u32) -> Result<u64, Errno> {
        match index {
            CONFIG_REGION => Ok(CONFIG_BYTES),
            _ if index < BAR_REGIONS => Ok(self.device.description().bar_size(index as u8).unwrap_or(0)),
            _ if index < REGIONS => Ok(0),
            _ => Err(Errno::INVAL),
        }
    }

    fn region_read(&mut self, access: RegionAccess) -> Result<(), Errno> {
        self.reply.extend_from_slice(access.as_bytes());
        if access.region < BAR_REGIONS {
            let (at, width) = bar_access(access)?;
            let value = self.device.bar_read(at, width).map_err(|_| Errno::INVAL)?;
            let bytes = value.to_le_bytes();
            self.reply.extend(bytes.into_iter().take(access.count as usize));
            return Ok(());
        }
        let offset = config_access(access)?;
        let begin = self.reply.len();
        self.reply.resize(begin + access.count as usize, 0);
        let into = self.reply.get_mut(begin..).ok_or(Errno::INVAL)?;
        self.device.config_read(offset, into).map_err(|_| Errno::INVAL)
    }

    fn region_write(&mut self, access: RegionAccess, data: &[u8]) -> Result<(), Errno> {
        if access.region < BAR_REGIONS {
            let (at, width) = bar_access(access)?;
            let mut bytes = [0; 8];
            bytes.get_mut(..data.len()).ok_or(Errno::INVAL)?.copy_from_slice(data);
            return self.device.bar_write(at, width, u64::from_le_bytes(bytes)).map_err(|_| Errno::INVAL);
        }
        let offset = config_access(access)?;
        self.device.config_write(offset, data).map_err(|_| Errno::INVAL)
    }
}

fn bar_access(access: RegionAccess) -> Result<(BarAddress, Width), Errno> {
    let width = Width::from_bytes(u64::from(access.count)).ok_or(Errno::INVAL)?;
    let at = BarAddress { bar: u8::try_from(access.region).map_err(|_| Errno::INVAL)?, offset: access.offset };
    Ok((at, width))
}

fn config_access(access: RegionAccess) -> Result<u16, Errno> {
    let end = access.offset.checked_add(u64::from(access.count)).ok_or(Errno::INVAL)?;
    if access.region != CONFIG_REGION || end > CONFIG_BYTES {
        return Err(Errno::INVAL);
    }
    u16::try_from(access.offset).map_err(|_| Errno::INVAL)
}

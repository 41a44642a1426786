//! Features: what a driver sets and reads back (NVMe 1.4, section 5.21.1).
//!
//! Set Features 7 (number of queues) with 0x0007_0007 asks for 8 queue pairs and is answered 0x003f_003f: 64 of each are there in any case.

use super::command::{Command, NSID_ALL, Status};
use super::engine::Flow;
use super::{IO_QUEUES, Nvme, VECTORS};
use crate::backend::Bus;

const ARBITRATION: u8 = 0x01;
const POWER_MANAGEMENT: u8 = 0x02;
const TEMPERATURE_THRESHOLD: u8 = 0x04;
const ERROR_RECOVERY: u8 = 0x05;
const WRITE_CACHE: u8 = 0x06;
const QUEUE_NUMBER: u8 = 0x07;
const INTERRUPT_COALESCING: u8 = 0x08;
const INTERRUPT_VECTOR: u8 = 0x09;
const WRITE_ATOMICITY: u8 = 0x0a;
const EVENT_CONFIGURATION: u8 = 0x0b;

/// The composite temperature that the model reports, in kelvin.
pub(super) const TEMPERATURE_KELVIN: u16 = 303;
/// Warning and critical composite temperature, in kelvin.
pub(super) const WARNING_KELVIN: u16 = 343;
pub(super) const CRITICAL_KELVIN: u16 = 373;
const QUEUES: u32 = (IO_QUEUES as u32 - 1) | (IO_QUEUES as u32 - 1) << 16;
/// Event configuration bits that the model knows: SMART warnings 4:0, namespace attribute notices 8.
const EVENTS: u32 = 0x11f;

/// The current values; a reset brings the defaults back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features {
    arbitration: u32,
    power: u32,
    over_kelvin: u16,
    under_kelvin: u16,
    error_recovery: u32,
    pub(super) write_cache_present: bool,
    pub(super) write_cache: bool,
    coalescing: u32,
    /// Vectors without coalescing, one bit each.
    uncoalesced: u128,
    atomicity: u32,
    events: u32,
}

impl Features {
    pub(super) const fn new(write_cache_present: bool) -> Self {
        Self {
            arbitration: 0,
            power: 0,
            over_kelvin: WARNING_KELVIN,
            under_kelvin: 0,
            error_recovery: 0,
            write_cache_present,
            write_cache: write_cache_present,
            coalescing: 0,
            uncoalesced: 0,
            atomicity: 0,
            events: 0,
        }
    }

    /// Critical warning bits of the SMART log (figure 194): bit 1, temperature outside its thresholds.
    pub(super) const fn critical_warning(&self) -> u8 {
        let outside = TEMPERATURE_KELVIN >= self.over_kelvin || TEMPERATURE_KELVIN <= self.under_kelvin;
        (outside as u8) << 1
    }

    fn read(&self, feature: u8, command: &Command) -> Result<u32, Status> {
        Ok(match feature {
            ARBITRATION => self.arbitration,
            POWER_MANAGEMENT => self.power,
            TEMPERATURE_THRESHOLD => match threshold(command.dword11)? {
                Threshold::Over => u32::from(self.over_kelvin),
                Threshold::Under => u32::from(self.under_kelvin),
                Threshold::NoSensor => 0,
            },
            ERROR_RECOVERY => self.error_recovery,
            WRITE_CACHE if self.write_cache_present => u32::from(self.write_cache),
            QUEUE_NUMBER => QUEUES,
            INTERRUPT_COALESCING => self.coalescing,
            INTERRUPT_VECTOR => {
                let vector = vector(command.dword11)?;
                u32::from(vector) | u32::from(self.uncoalesced >> vector & 1 != 0) << 16
            }
            WRITE_ATOMICITY => self.atomicity,
            EVENT_CONFIGURATION => self.events,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    fn write(&mut self, feature: u8, command: &Command) -> Result<u32, Status> {
        let value = command.dword11;
        match feature {
            ARBITRATION => self.arbitration = value,
            // One power state, and no workload hint that changes anything.
            POWER_MANAGEMENT if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            POWER_MANAGEMENT => self.power = value & 0xff,
            TEMPERATURE_THRESHOLD => match threshold(value)? {
                Threshold::Over => self.over_kelvin = value as u16,
                Threshold::Under => self.under_kelvin = value as u16,
                Threshold::NoSensor => return Err(Status::INVALID_FIELD),
            },
            // Deallocated blocks read as zeroes, so an error for reading them cannot be had (DULBE, bit 16).
            ERROR_RECOVERY if value >> 16 & 1 != 0 => return Err(Status::INVALID_FIELD),
            ERROR_RECOVERY => self.error_recovery = value & 0xffff,
            WRITE_CACHE if self.write_cache_present => self.write_cache = value & 1 != 0,
            // 65,535 is not allowed in either half (section 5.21.1.7).
            QUEUE_NUMBER if value & 0xffff == 0xffff || value >> 16 == 0xffff => return Err(Status::INVALID_FIELD),
            QUEUE_NUMBER => return Ok(QUEUES),
            INTERRUPT_COALESCING => self.coalescing = value & 0xffff,
            INTERRUPT_VECTOR => {
                let bit = 1 << vector(value)?;
                if value >> 16 & 1 != 0 {
                    self.uncoalesced |= bit;
                } else {
                    self.uncoalesced &= !bit;
                }
            }
            WRITE_ATOMICITY => self.atomicity = value & 1,
            EVENT_CONFIGURATION => self.events = value & EVENTS,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }
}

enum Threshold {
    Over,
    Under,
    NoSensor,
}

/// Which threshold dword 11 means: sensor 19:16 (0 is the composite, 15 all), over or under 21:20.
const fn threshold(value: u32) -> Result<Threshold, Status> {
    match (value >> 16 & 0xf, value >> 20 & 3) {
        (0 | 15, 0) => Ok(Threshold::Over),
        (0 | 15, 1) => Ok(Threshold::Under),
        (_, 0 | 1) => Ok(Threshold::NoSensor),
        _ => Err(Status::INVALID_FIELD),
    }
}

const fn vector(value: u32) -> Result<u16, Status> {
    let vector = value as u16;
    if vector < VECTORS {
        Ok(vector)
    } else {
        Err(Status::INVALID_FIELD)
    }
}

impl Nvme {
    pub(super) fn read_feature(&mut self, index: u32) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let feature = slot.command.dword10 as u8;
        let answer = match slot.command.dword10 >> 8 & 7 {
            0 => self.features.read(feature, &slot.command),
            // Nothing is saved, so saved values are the defaults.
            1 | 2 => Features::new(self.features.write_cache_present).read(feature, &slot.command),
            // Capabilities: changeable (bit 2), for the whole controller (bit 1 is 0), not saveable (bit 0).
            3 => self.features.read(feature, &slot.command).map(|_| 1 << 2),
            _ => Err(Status::INVALID_FIELD),
        };
        match answer {
            Ok(value) => slot.answer(value),
            Err(status) => slot.refuse(status),
        }
    }

    pub(super) fn set_feature(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let command = slot.command;
        let feature = command.dword10 as u8;
        if command.dword10 >> 31 != 0 {
            return slot.refuse(Status::FEATURE_NOT_SAVEABLE);
        }
        if !matches!(command.namespace, 0 | NSID_ALL) {
            // None of them belongs to one namespace (section 5.21: feature not namespace specific is 1/0Fh; the driver's field is at fault).
            return slot.refuse(Status::INVALID_FIELD);
        }
        let io_queues_exist = self.completion.iter().skip(1).any(|completion| completion.exists());
        if feature == QUEUE_NUMBER && io_queues_exist {
            return slot.refuse(Status::SEQUENCE_ERROR);
        }
        let warned = self.features.critical_warning();
        let flow = match self.features.write(feature, &command) {
            Ok(value) => slot.answer(value),
            Err(status) => slot.refuse(status),
        };
        let warning = self.features.critical_warning();
        if warning & !warned & self.features.events as u8 != 0 {
            self.raise_event(super::events::TEMPERATURE, bus);
        }
        flow
    }
}

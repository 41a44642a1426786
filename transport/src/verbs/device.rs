//! The RDMA devices of this host: which there are, what their ports are worth, and which port and address a link uses.
//!
//! `dev=rxe0` on a host with one RoCE v2 address 192.0.2.1 gives port 1, GID index 1 `::ffff:192.0.2.1`, MTU 4096 and messages of at most 8 MiB. Without a
//! name, a device is chosen only where exactly one has an active port: a link over the wrong network would be slow at best.

use std::net::Ipv6Addr;
use std::sync::Arc;

use super::context::{Context, device_names};
use super::error::{NoRdma, VerbsError};
use super::library::Library;
use super::sys::{IBV_GID_TYPE_IB, IBV_GID_TYPE_ROCE_V2, IBV_PORT_ACTIVE, ibv_device_attr, ibv_port_attr};
use super::windows::GrantMethod;

/// `link_layer` of a port that is Ethernet (verbs.h, IBV_LINK_LAYER_ETHERNET); all others are InfiniBand.
const ETHERNET: u8 = 2;

/// Which device, port and address a link is to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceChoice {
    /// The device's name, as `farbus devices` and ibv_devices(1) print it; `None`: the only one with an active port.
    pub device: Option<String>,
    /// The port, counted from 1; `None`: the first that is active.
    pub port: Option<u8>,
    /// The index of its address; `None`: the first RoCE v2 address that is no link-local one, if there is one.
    pub gid: Option<u32>,
    /// How memory is granted to the peer.
    pub grants: GrantMethod,
}

impl DeviceChoice {
    /// The choice that a link would make now, with nothing left open.
    ///
    /// # Errors
    /// [`VerbsError::NoRdma`] where nothing fits.
    pub fn resolve(&self) -> Result<Self, VerbsError> {
        let open = OpenPort::open(self)?;
        Ok(Self {
            device: Some(open.context.name().to_owned()),
            port: Some(open.number),
            gid: Some(open.gid_index),
            ..self.clone()
        })
    }
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Its index, for [`DeviceChoice::gid`].
    pub index: u32,
    /// The address.
    pub address: Ipv6Addr,
    /// Whether packets to it travel in UDP (RoCE v2), the only kind used on Ethernet here.
    pub roce_v2: bool,
    /// The network interface it belongs to, by number; 0 where there is none.
    pub interface: u32,
}

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// Its number, from 1.
    pub number: u8,
    /// "active", "down", …
    pub state: &'static str,
    /// Bytes of payload in a packet.
    pub mtu_bytes: u32,
    /// Bytes of the longest single operation of the device; longer ones are split.
    pub max_message_bytes: u32,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// A device, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Work requests that a queue holds at most.
    pub max_work_requests: u32,
    /// Memory regions at most.
    pub max_regions: u32,
    /// Bytes of the largest memory region.
    pub max_region_bytes: u64,
    /// Reads that a queue pair serves at once.
    pub max_reads: u32,
    /// Whether it offers type-2 memory windows.
    pub memory_windows: bool,
    /// Its ports.
    pub ports: Vec<PortInfo>,
}

/// The devices of this host.
///
/// # Errors
/// [`VerbsError::NoRdma`] where there is none, with the reason.
pub fn devices() -> Result<Vec<DeviceInfo>, VerbsError> {
    let library = Library::load()?;
    let names = device_names(library);
    if names.is_empty() {
        return Err(NoRdma::Device.into());
    }
    let (mut found, mut refused) = (Vec::new(), None);
    for name in names {
        match Context::open(library, &name).and_then(|context| context.as_ref().map(describe).transpose()) {
            Ok(info) => found.extend(info),
            Err(error) => pass_over(&name, error, &mut refused),
        }
    }
    if found.is_empty() { refused.map_or(Ok(found), Err) } else { Ok(found) }
}

/// A device that cannot be used must not hide the others; where there is no other, the first such is the reason.
fn pass_over(name: &str, error: VerbsError, first: &mut Option<VerbsError>) {
    tracing::warn!(device = name, %error, "an RDMA device cannot be used");
    first.get_or_insert(error);
}

/// Whether a link could be made over the device of `choice`: it is there, its port is active and has an address.
///
/// # Errors
/// [`VerbsError::NoRdma`], with what is missing.
pub fn check(choice: &DeviceChoice) -> Result<(), VerbsError> {
    OpenPort::open(choice).map(drop)
}

/// An open device with the port and the address that a link uses.
pub(super) struct OpenPort {
    pub(super) context: Arc<Context>,
    pub(super) limits: ibv_device_attr,
    pub(super) port: ibv_port_attr,
    pub(super) number: u8,
    pub(super) gid_index: u32,
    pub(super) gid: [u8; 16],
}

impl OpenPort {
    /// Packets carry a global route header: always on Ethernet.
    pub(super) fn is_ethernet(&self) -> bool {
        self.port.link_layer == ETHERNET
    }

    pub(super) fn open(choice: &DeviceChoice) -> Result<Self, VerbsError> {
        let library = Library::load()?;
        let names = device_names(library);
        if names.is_empty() {
            return Err(NoRdma::Device.into());
        }
        let name = match &choice.device {
            Some(wanted) if names.contains(wanted) => wanted.clone(),
            Some(wanted) => return Err(NoRdma::NoSuchDevice { wanted: wanted.clone(), found: names }.into()),
            None => only_active(library, &names)?,
        };
        // It may have gone since it was listed.
        let context = Context::open(library, &name)?.ok_or(NoRdma::Device)?;
        let limits = context.query()?;
        let number = match choice.port {
            Some(port) if port == 0 || port > limits.phys_port_cnt => {
                return Err(NoRdma::NoSuchPort { device: name, port, ports: limits.phys_port_cnt }.into());
            }
            Some(port) => port,
            None => first_active(&context, limits.phys_port_cnt)?.unwrap_or(1),
        };
        let port = context.query_port(number)?;
        if port.state != IBV_PORT_ACTIVE {
            return Err(NoRdma::PortDown { device: name, port: number, state: state(&port) }.into());
        }
        let ethernet = port.link_layer == ETHERNET;
        let usable = context.gids()?.into_iter().filter(|entry| {
            let kind = if ethernet { IBV_GID_TYPE_ROCE_V2 } else { IBV_GID_TYPE_IB };
            // An address handle names an address by eight bits.
            entry.port_num == u32::from(number) && entry.gid_type == kind && entry.gid_index <= u32::from(u8::MAX)
        });
        let mut usable: Vec<(u32, [u8; 16])> = usable.map(|entry| (entry.gid_index, raw(&entry.gid))).collect();
        // Stable: of several good ones the first of the table.
        usable.sort_by_key(|(_, gid)| Ipv6Addr::from(*gid).is_unicast_link_local());
        let found = usable.into_iter().find(|(index, _)| choice.gid.is_none_or(|wanted| *index == wanted));
        let (gid_index, gid) = found.ok_or(NoRdma::NoGid { device: name, port: number, index: choice.gid })?;
        Ok(Self { context, limits, port, number, gid_index, gid })
    }
}

fn only_active(library: &'static Library, names: &[String]) -> Result<String, VerbsError> {
    let (mut active, mut refused) = (Vec::new(), None);
    for name in names {
        let port = Context::open(library, name).and_then(|context| match context {
            Some(context) => first_active(&context, context.query()?.phys_port_cnt),
            None => Ok(None),
        });
        match port {
            Ok(Some(_)) => active.push(name.clone()),
            Ok(None) => {}
            Err(error) => pass_over(name, error, &mut refused),
        }
    }
    if let (true, Some(error)) = (active.is_empty(), refused) {
        return Err(error);
    }
    match (active.len(), names.first()) {
        (1, _) => Ok(active.swap_remove(0)),
        // The check of the port says that it is down.
        (0, Some(first)) => Ok(first.clone()),
        _ => Err(NoRdma::Ambiguous { found: active }.into()),
    }
}

fn first_active(context: &Context, ports: u8) -> Result<Option<u8>, VerbsError> {
    for number in 1..=ports {
        if context.query_port(number)?.state == IBV_PORT_ACTIVE {
            return Ok(Some(number));
        }
    }
    Ok(None)
}

fn describe(context: &Arc<Context>) -> Result<DeviceInfo, VerbsError> {
    let limits = context.query()?;
    let gids = context.gids()?;
    let mut ports = Vec::new();
    for number in 1..=limits.phys_port_cnt {
        let port = context.query_port(number)?;
        let of_port = gids.iter().filter(|entry| entry.port_num == u32::from(number)).map(|entry| Gid {
            index: entry.gid_index,
            address: Ipv6Addr::from(raw(&entry.gid)),
            roce_v2: entry.gid_type == IBV_GID_TYPE_ROCE_V2,
            interface: entry.ndev_ifindex,
        });
        ports.push(PortInfo {
            number,
            state: state(&port),
            mtu_bytes: mtu_bytes(port.active_mtu),
            max_message_bytes: port.max_msg_sz,
            gids: of_port.collect(),
        });
    }
    let count = |value: i32| u32::try_from(value).unwrap_or(0);
    Ok(DeviceInfo {
        name: context.name().to_owned(),
        max_work_requests: count(limits.max_qp_wr),
        max_regions: count(limits.max_mr),
        max_region_bytes: limits.max_mr_size,
        max_reads: count(limits.max_qp_rd_atom),
        memory_windows: limits.device_cap_flags & super::sys::IBV_DEVICE_MEM_WINDOW_TYPE_2B != 0,
        ports,
    })
}

/// Bytes of an `ibv_mtu`: 1 is 256, 5 is 4,096; 0 for what does not exist.
pub(super) fn mtu_bytes(mtu: u32) -> u32 {
    if (1..=5).contains(&mtu) { 128 << mtu } else { 0 }
}

fn state(port: &ibv_port_attr) -> &'static str {
    // Table "port state" of the InfiniBand Architecture Specification 1.4, volume 1, section 14.2.5.6, with ibv_port_state's numbers.
    match port.state {
        1 => "down",
        2 => "initializing",
        3 => "armed",
        4 => "active",
        5 => "deferred",
        _ => "in an unknown state",
    }
}

fn raw(gid: &super::sys::ibv_gid) -> [u8; 16] {
    // SAFETY: both members of the union are 16 bytes without invalid values.
    unsafe { gid.raw }
}

//! `farbus borrow`: a lender's device, offered to an unmodified VMM at a vfio-user socket.
//!
//! One thread owns the link, the function and the socket; tokio waits for signals beside it. The command says why it ended: a signal, or a
//! lender that is gone.

use anyhow::{Context, bail};
use farbus_pci_shim::vfio_user::{ClientInterrupts, Ended, OnUnshared, Options, Server};
use farbus_pci_shim::{Function, FunctionOptions, InterruptOwner};
use farbus_remote_dma::DeviceDescription;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{Connection, ListenError, ShmFabric, ShmOptions, connect};
use serde_json::json;
use tokio::sync::oneshot;

use crate::cli::{BorrowArgs, Unshared};
use crate::lend::{FEATURE_BUSY, FEATURE_WEDGED};
use crate::link_address::LinkAddress;
use crate::output::Events;
use crate::signals::EndSignals;

/// Borrows until the lender is gone or a signal comes.
pub fn run(args: &BorrowArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the control plane")?;
    let mut signals = {
        let _inside = runtime.enter();
        EndSignals::new().context("cannot wait for signals")?
    };
    let events = Events::new(args.json);
    // Bound before the lender is asked, so that a device is not taken for a socket that cannot be served.
    let mut server = Server::bind(&args.vfio_user).context("cannot serve there")?;
    let options = BorrowerOptions { read_deadline: args.read_deadline, ..BorrowerOptions::default() };
    let session = attach(&args.from, options)?;
    let name = session_name(&session);
    let interrupts = ClientInterrupts::new(farbus_remote_dma::Attachment::description(&session));
    let mut function = Function::new(Box::new(session), interrupts, FunctionOptions { interrupts: InterruptOwner::Client })?;
    let socket = args.vfio_user.display().to_string();
    events.say(
        "serving",
        json!({ "device": name, "from": args.from.to_string(), "socket": socket }),
        &format!("serving {name} from {} at {socket}", args.from),
    );

    let stop = server.stop_handle();
    let on_unshared = match args.unshared {
        Unshared::Messages => OnUnshared::Messages,
        Unshared::Refuse => OnUnshared::Refuse,
    };
    let options = Options { spin: args.spin, on_unshared, ..Options::default() };
    // The thread cannot be awaited; what it holds until its end can.
    let (held, released) = oneshot::channel::<()>();
    let serving = std::thread::Builder::new().name("farbus-borrower".into()).spawn(move || {
        let _held = held;
        let ended = server.serve(&mut function, &options);
        (ended, function.counters())
    })?;
    let signal = runtime.block_on(async {
        tokio::select! {
            signal = signals.next() => Some(signal),
            _ = released => None,
        }
    });
    stop.stop();
    let Ok((ended, counters)) = serving.join() else { bail!("the serving thread failed") };
    tracing::info!(?counters, "the function's counts");
    let reason = match ended? {
        Ended::Stopped => signal.unwrap_or("stopped").to_owned(),
        Ended::DeviceGone(reason) => format!("the lender: {reason}"),
    };
    events.say("ended", json!({ "reason": reason }), &format!("ended: {reason}"));
    Ok(())
}

/// Connects to a lender.
pub fn attach(from: &LinkAddress, options: BorrowerOptions) -> anyhow::Result<BorrowerSession<ShmFabric>> {
    let LinkAddress::Shm(path) = from;
    let features = FEATURE_BUSY | FEATURE_WEDGED;
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features, epoch: 0, description: Vec::new() };
    let Connection { fabric, agreed } = match connect(path, &hello, ShmOptions::default()) {
        Err(ListenError::Refused { agreed, .. }) if agreed.features & FEATURE_BUSY != 0 => {
            bail!("the device at {from} is lent to another borrower: try again when that one has left")
        }
        Err(ListenError::Refused { agreed, .. }) if agreed.features & FEATURE_WEDGED != 0 => {
            bail!("the device at {from} does not end what it was doing for its last borrower: look at its disk, or try again later")
        }
        connected => connected.with_context(|| format!("cannot borrow from {from}: is `farbus lend` running there?"))?,
    };
    let description = DeviceDescription::decode(&agreed.peer.description)
        .with_context(|| format!("the lender at {from} is wrong about its device"))?;
    BorrowerSession::new(fabric, description, options).context("cannot share memory with the lender")
}

fn session_name(session: &BorrowerSession<ShmFabric>) -> String {
    farbus_remote_dma::Attachment::description(session).name.clone()
}

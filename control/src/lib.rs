//! How two hosts meet: TCP, mutual TLS 1.3, hellos, and from there a [`Control`](farbus_transport::link::control::Control) for an RDMA link.
//!
//! The lender of host nas listens and borrower vm7 comes, each with a certificate of one small [`authority`]:
//!
//! ```
//! # use farbus_control::authority::{Authority, Request};
//! # use farbus_control::certificate::Validity;
//! # use farbus_control::identity::Identity;
//! # use farbus_control::{AllowList, BorrowerSecurity, Credentials, LenderSecurity, Listener, connect};
//! # use farbus_transport::link::hello::{Hello, Role, SPOKEN};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let authority = Authority::create(&"lab".parse()?, Validity::days_from_now(2))?;
//! # let credentials = |identity: &str, addresses: &[&str]| -> Result<Credentials, Box<dyn std::error::Error>> {
//! #     let identity = Identity::from_uri(identity).ok_or("no identity")?;
//! #     let addresses = addresses.iter().map(|&address| address.to_owned()).collect();
//! #     let issued = authority.issue(&Request { identity, addresses, validity: Validity::days_from_now(1) })?;
//! #     Ok(Credentials::from_pem(issued.certificate.as_bytes(), issued.key.as_bytes(), issued.authority.as_bytes())?)
//! # };
//! # let (nas, vm7) = (credentials("farbus:lender/nas", &["127.0.0.1"])?, credentials("farbus:borrower/vm7", &[])?);
//! # let hello = |role| Hello { versions: SPOKEN, role, features: 0, epoch: 0, description: b"a device".to_vec() };
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
//! let mut allow = AllowList::default();
//! allow.add("vm7")?;
//! let security = LenderSecurity::Tls { credentials: nas, allow };
//! let listener = runtime.block_on(Listener::bind(&"127.0.0.1:0".parse()?, security))?;
//! let at = listener.address().to_string().parse()?;
//! let borrower = std::thread::spawn(move || -> Result<_, farbus_control::MeetError> {
//!     let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
//!     let security = BorrowerSecurity::Tls { credentials: vm7, peer: None };
//!     runtime.block_on(connect(&at, &security))?.greet(&hello(Role::Borrower))
//! });
//! let greeted = runtime.block_on(listener.accept())?.greet(&hello(Role::Lender))?;
//! assert_eq!(greeted.peer().unwrap().to_string(), "farbus:borrower/vm7");
//! let mut lender = greeted.welcome()?;
//! lender.control.send(b"1e 00 00 00")?;
//! assert_eq!(borrower.join().unwrap()?.agreed.peer.description, b"a device");
//! # Ok(())
//! # }
//! ```
//!
//! It knows nothing of RDMA: what is sent in the frames is the fabric's affair.

pub mod address;
pub mod allow;
pub mod authority;
pub mod certificate;
mod connect;
pub mod credentials;
mod error;
pub mod identity;
mod listen;
mod meet;
pub mod read;
pub mod store;
mod stream;
mod verify;

pub use address::HostPort;
pub use allow::AllowList;
pub use connect::{BorrowerSecurity, CONNECT_LIMIT, Dialled, connect};
pub use credentials::{CredentialFiles, Credentials};
pub use error::{CertificateProblem, MeetError, Unwelcome};
pub use listen::{Arrival, Greeted, LenderSecurity, Listener, MAX_FROM_ONE, MAX_GREETINGS};
pub use meet::{HANDSHAKE_LIMIT, Met, PROBE_AFTER, PROBE_EVERY, PROBES, UNACKNOWLEDGED};

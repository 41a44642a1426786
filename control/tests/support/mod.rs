//! What the tests of two hosts share: a site with its authority, a lender at a loopback port, and borrowers that come to it.
//!
//! `site.lender("nas").meet(&site.borrower("vm7"))` gives what each side made of the other, over a real TCP connection.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::net::SocketAddr;
use std::time::Duration;

use farbus_control::authority::{Authority, Issued, Request};
use farbus_control::certificate::Validity;
use farbus_control::identity::Identity;
use farbus_control::{AllowList, BorrowerSecurity, Credentials, Greeted, LenderSecurity, Listener, MeetError, Met, connect};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use tokio::runtime::Runtime;

/// Enough for anything on a machine that is busy with other tests.
pub const AMPLE: Duration = Duration::from_secs(30);

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub fn hello(role: Role) -> Hello {
    Hello { versions: SPOKEN, role, features: 0, epoch: 1, description: b"a secret device".to_vec() }
}

pub fn identity(uri: &str) -> Identity {
    Identity::from_uri(uri).unwrap()
}

pub fn take(issued: &Issued) -> Credentials {
    Credentials::from_pem(issued.certificate.as_bytes(), issued.key.as_bytes(), issued.authority.as_bytes()).unwrap()
}

/// An authority, and what it signs.
pub struct Site(pub Authority);

impl Site {
    pub fn new() -> Self {
        Self(Authority::create(&"lab".parse().unwrap(), Validity::days_from_now(100)).unwrap())
    }

    pub fn issue(&self, uri: &str, addresses: &[&str], validity: Validity) -> Issued {
        let addresses = addresses.iter().map(|&address| address.to_owned()).collect();
        self.0.issue(&Request { identity: identity(uri), addresses, validity }).unwrap()
    }

    /// A lender at 127.0.0.1 that lends to vm7.
    pub fn lender(&self) -> Lender {
        Lender::tls(self.nas(), &["vm7"])
    }

    pub fn nas(&self) -> Credentials {
        take(&self.issue("farbus:lender/nas", &["127.0.0.1"], Validity::days_from_now(10)))
    }

    pub fn vm(&self, name: &str) -> Credentials {
        take(&self.issue(&format!("farbus:borrower/{name}"), &[], Validity::days_from_now(10)))
    }

    /// What vm7 comes with.
    pub fn vm7(&self) -> BorrowerSecurity {
        tls(self.vm("vm7"))
    }
}

pub fn tls(credentials: Credentials) -> BorrowerSecurity {
    BorrowerSecurity::Tls { credentials, peer: None }
}

pub const PLAIN: BorrowerSecurity = BorrowerSecurity::Plain { beyond_loopback: false };

/// A lender that listens.
pub struct Lender {
    pub runtime: Runtime,
    pub listener: Listener,
}

impl Lender {
    pub fn new(security: LenderSecurity) -> Self {
        let runtime = runtime();
        let listener = runtime.block_on(Listener::bind(&"127.0.0.1:0".parse().unwrap(), security)).unwrap();
        Self { runtime, listener }
    }

    pub fn tls(credentials: Credentials, allowed: &[&str]) -> Self {
        let mut allow = AllowList::default();
        for name in allowed {
            allow.add(name).unwrap();
        }
        Self::new(LenderSecurity::Tls { credentials, allow })
    }

    pub fn plain() -> Self {
        Self::new(LenderSecurity::Plain { beyond_loopback: false })
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Greets the next visitor, here.
    pub fn greet(&self) -> Result<Greeted, MeetError> {
        self.runtime.block_on(self.listener.accept()).unwrap().greet(&hello(Role::Lender))
    }

    /// What each made of the other, with the lender's welcome where it came to that.
    pub fn meet(&self, security: &BorrowerSecurity) -> (Result<Met, MeetError>, Result<Met, MeetError>) {
        let (address, security) = (self.address(), security.clone());
        let borrower = std::thread::spawn(move || borrow(address, &security, &hello(Role::Borrower)));
        let lender = self.greet().and_then(Greeted::welcome);
        (lender, borrower.join().unwrap())
    }

    /// Both failed; the errors of lender and borrower.
    #[track_caller]
    pub fn part(&self, security: &BorrowerSecurity) -> (MeetError, MeetError) {
        let (lender, borrower) = self.meet(security);
        (lender.unwrap_err(), borrower.unwrap_err())
    }

    /// After whatever happened before, a good borrower is served.
    #[track_caller]
    pub fn assert_serves(&self, security: &BorrowerSecurity) {
        let (lender, borrower) = self.meet(security);
        let (mut lender, mut borrower) = (lender.unwrap(), borrower.unwrap());
        assert_eq!(borrower.agreed.peer.description, b"a secret device");
        lender.control.send(b"a frame").unwrap();
        assert_eq!(frame(&mut borrower), b"a frame");
        borrower.control.send(b"its answer").unwrap();
        assert_eq!(frame(&mut lender), b"its answer");
    }
}

/// Comes to a lender and says `hello`.
pub fn borrow(to: SocketAddr, security: &BorrowerSecurity, hello: &Hello) -> Result<Met, MeetError> {
    runtime().block_on(connect(&to.to_string().parse().unwrap(), security))?.greet(hello)
}

/// The next frame.
#[track_caller]
pub fn frame(met: &mut Met) -> Vec<u8> {
    let deadline = std::time::Instant::now() + AMPLE;
    farbus_transport::link::control::receive_by(met.control.as_mut(), deadline).unwrap().unwrap()
}

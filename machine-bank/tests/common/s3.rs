//! An S3 service that is not ours (s3s-fs), on a port of this host, and a wire to it that can be cut, stopped and made to answer for it.
//!
//! `Service::start()` has one empty bucket, `bank`; `service.store("a")` is a store in it, `service.wire.be(Mood::Gone)` refuses every connection.
#![allow(dead_code, reason = "each test program uses some of it")]
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farbus_machine_bank::store::ObjectStore;
use farbus_machine_bank::store::object::{LeaseTimes, ObjectOptions};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;

/// What the wire does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Passes everything on.
    Fine,
    /// Closes it at once, those that are there too.
    Gone,
    /// Takes it and says nothing.
    Silent,
    /// Answers every request with this status, and its reason.
    Says(u16, &'static str),
    /// Passes on so many bytes to the service in all, and then closes it for ever.
    Cut(u64),
    /// Passes on one request, and says 502 in the place of its answer; after that it is fine.
    Forgets,
}

/// The wire.
#[derive(Clone, Debug)]
pub struct Wire {
    mood: Arc<Mutex<Mood>>,
    live: Arc<Mutex<Vec<TcpStream>>>,
    sent: Arc<AtomicU64>,
    /// Bytes that came back.
    pub received: Arc<AtomicU64>,
    address: SocketAddr,
}

impl Wire {
    fn to(service: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let wire = Self {
            mood: Arc::new(Mutex::new(Mood::Fine)),
            live: Arc::default(),
            sent: Arc::default(),
            received: Arc::default(),
            address,
        };
        let of_thread = wire.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let wire = of_thread.clone();
                std::thread::spawn(move || wire.carry(client, service));
            }
        });
        wire
    }

    pub fn be(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
        self.sent.store(0, Ordering::Relaxed);
        if mood != Mood::Fine {
            // What is kept open for the next request would not notice.
            self.live.lock().unwrap().drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
        }
    }

    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }

    fn carry(&self, mut client: TcpStream, service: SocketAddr) {
        match self.mood() {
            Mood::Gone => {}
            Mood::Silent => {
                while self.mood() == Mood::Silent {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            Mood::Says(status, reason) => {
                let mut request = [0; 65536];
                client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                while matches!(client.read(&mut request), Ok(1..)) {}
                let answer = format!("HTTP/1.1 {status} {reason}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                _ = client.write_all(answer.as_bytes());
            }
            Mood::Forgets => {
                let server = TcpStream::connect(service).unwrap();
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let there = std::thread::spawn(move || pass(from, to, &|_| true));
                let mut answer = [0; 65536];
                assert!((&server).read(&mut answer).unwrap() > 0, "the service did not answer");
                *self.mood.lock().unwrap() = Mood::Fine;
                let said = "HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                _ = client.write_all(said.as_bytes());
                _ = client.shutdown(Shutdown::Both);
                there.join().unwrap();
            }
            Mood::Fine | Mood::Cut(_) => {
                let server = TcpStream::connect(service).unwrap();
                self.live.lock().unwrap().extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                let (back_from, back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let received = self.received.clone();
                let back = std::thread::spawn(move || {
                    pass(back_from, back_to, &|bytes| {
                        received.fetch_add(bytes, Ordering::Relaxed);
                        true
                    });
                });
                pass(client, server, &|bytes| {
                    let sent = self.sent.fetch_add(bytes, Ordering::Relaxed) + bytes;
                    !matches!(self.mood(), Mood::Cut(most) if sent > most)
                });
                back.join().unwrap();
            }
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, may: &dyn Fn(u64) -> bool) {
    let mut buf = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buf) {
        if !may(count as u64) || to.write_all(&buf[..count]).is_err() {
            break;
        }
    }
    _ = from.shutdown(Shutdown::Both);
    _ = to.shutdown(Shutdown::Both);
}

/// The service.
#[derive(Debug)]
pub struct Service {
    pub wire: Wire,
    pub folder: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Service {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("bank")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let service = {
            let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder.path()).unwrap());
            builder.set_auth(SimpleAuth::from_single("who", "secret"));
            builder.build()
        };
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
                    // A connection that was cut is what some tests want.
                    _ = server.serve_connection(hyper_util::rt::TokioIo::new(socket), service).await;
                });
            }
        });
        Self { wire: Wire::to(address), folder, _runtime: runtime }
    }

    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.wire.address);
        [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "who"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// A store under `prefix` for large objects, which take their time where nothing is optimized.
    pub fn patient(&self, prefix: &str) -> ObjectStore {
        ObjectStore::s3("bank", prefix, self.environment(), ObjectOptions::default()).unwrap()
    }

    /// A store under `prefix`, with the patience of a test.
    pub fn store(&self, prefix: &str) -> ObjectStore {
        ObjectStore::s3("bank", prefix, self.environment(), quick()).unwrap()
    }
}

/// Waits 2 s for an answer, and has leases of 3 s.
pub fn quick() -> ObjectOptions {
    let [life, lapse, renew] = [3000, 2000, 300].map(Duration::from_millis);
    ObjectOptions { limit: Duration::from_secs(2), lease: LeaseTimes { life, lapse, renew } }
}

//! Metrics over HTTP: one request a connection, two paths, and nothing that a client does costs more than one of a few places for five seconds.
//!
//! `curl 127.0.0.1:9464/metrics` gets the counters, `/health` answers 200 "lent" or 503 "gone", all else 404. Of more than 16 clients at once the oldest is
//! cut: whoever means it needs milliseconds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::board::Board;
use super::metrics;

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// From the connection to the end of the answer.
const LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a request, with its headers.
const MAX_REQUEST: usize = 8192;
/// Headers of a request.
const MAX_HEADERS: usize = 64;

/// Answers without end.
pub async fn serve(listener: &TcpListener, board: &Arc<Board>) {
    let mut clients: VecDeque<JoinHandle<()>> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a client of the metrics cannot be accepted yet");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        clients.retain(|client| !client.is_finished());
        if clients.len() >= MAX_CLIENTS
            && let Some(oldest) = clients.pop_front()
        {
            oldest.abort();
        }
        let board = Arc::clone(board);
        clients.push_back(tokio::spawn(async move {
            match tokio::time::timeout(LIMIT, answer(stream, &board)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a client of the metrics left"),
                Err(_) => tracing::debug!("a client of the metrics was too slow"),
            }
        }));
    }
}

async fn answer(mut stream: TcpStream, board: &Board) -> std::io::Result<()> {
    let mut request = Vec::with_capacity(1024);
    let answer = loop {
        let mut piece = [0; 1024];
        let count = stream.read(&mut piece).await?;
        let Some(piece) = piece.get(..count).filter(|piece| !piece.is_empty()) else {
            return Ok(());
        };
        request.extend_from_slice(piece);
        if let Some(answer) = answer_to(&request, board) {
            break answer;
        }
    };
    stream.write_all(&answer).await?;
    stream.shutdown().await
}

/// The answer to what a client has said so far; `None` where it has not said all.
fn answer_to(request: &[u8], board: &Board) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let (status, kind, body) = match parsed.parse(request) {
        Ok(httparse::Status::Partial) if request.len() < MAX_REQUEST => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            ("431 Request Header Fields Too Large", TEXT, "too long\n".to_owned())
        }
        Err(_) => ("400 Bad Request", TEXT, "this is no request\n".to_owned()),
        Ok(httparse::Status::Complete(_)) => match (parsed.method, parsed.path.and_then(|path| path.split('?').next())) {
            (Some("GET" | "HEAD"), Some("/metrics")) => ("200 OK", metrics::CONTENT_TYPE, metrics::text(board)),
            (Some("GET" | "HEAD"), Some("/health")) => {
                let (good, state) = board.health();
                (if good { "200 OK" } else { "503 Service Unavailable" }, TEXT, format!("{state}\n"))
            }
            (Some("GET" | "HEAD"), _) => ("404 Not Found", TEXT, "there are /metrics and /health\n".to_owned()),
            _ => ("405 Method Not Allowed\r\nAllow: GET, HEAD", TEXT, "only GET\n".to_owned()),
        },
    };
    let length = body.len();
    let mut answer =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").into_bytes();
    if parsed.method != Some("HEAD") {
        answer.extend_from_slice(body.as_bytes());
    }
    Some(answer)
}

const TEXT: &str = "text/plain; charset=utf-8";

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::time::Instant;

    use super::*;

    fn start(board: Arc<Board>) -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { serve(&TcpListener::from_std(listener).unwrap(), &board).await });
        });
        address
    }

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // One that is answered before it has said all may see its words refused.
        let _cut = stream.write_all(request);
        let mut said = Vec::new();
        let _cut = stream.read_to_end(&mut said);
        String::from_utf8(said).unwrap()
    }

    fn status(address: SocketAddr, request: &[u8]) -> String {
        ask(address, request).split(' ').nth(1).unwrap_or("nothing").to_owned()
    }

    #[test]
    fn two_paths_are_answered_and_all_else_is_refused() {
        let board = Arc::new(Board::new("lend"));
        let address = start(Arc::clone(&board));
        assert!(ask(address, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").contains("farbus_state"));
        assert_eq!(status(address, b"GET /health HTTP/1.0\r\n\r\n"), "503");
        board.state("lent");
        assert!(ask(address, b"GET /health HTTP/1.0\r\n\r\n").ends_with("\r\n\r\nlent\n"));
        assert!(ask(address, b"HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        for (request, wanted) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
            (b"GET /metrics/../x HTTP/1.1\r\n\r\n", "404"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
            (b"\x16\x03\x01\x02\x00\x01\x00", "400"),
            (b"GET /metrics SPDY/9\r\n\r\n", "400"),
        ] {
            assert_eq!(status(address, request), wanted, "{}", String::from_utf8_lossy(request));
        }
        let long = [&b"GET /metrics HTTP/1.1\r\nX: "[..], &[b'x'; MAX_REQUEST]].concat();
        assert_eq!(status(address, &long), "431");
    }

    #[test]
    fn clients_that_say_nothing_or_never_end_keep_nobody_waiting() {
        let address = start(Arc::new(Board::new("lend")));
        let slow: Vec<_> = (0..200)
            .map(|number| {
                let mut stream = TcpStream::connect(address).unwrap();
                if number % 2 == 0 {
                    let _cut = stream.write_all(b"GET /metrics HTTP/1.1\r\nX-");
                }
                stream
            })
            .collect();
        let start = Instant::now();
        assert_eq!(status(address, b"GET /metrics HTTP/1.1\r\n\r\n"), "200");
        assert!(start.elapsed() < LIMIT / 2, "it took {:?}", start.elapsed());
        drop(slow);
    }
}

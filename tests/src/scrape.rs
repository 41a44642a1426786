//! What a scraper sees of a service's metrics, and whether it is the text format that it should be.
//!
//! `value(&samples("127.0.0.1:9464"), "farbus_lend_visits_total")` is 1 after the first borrower; a line that Prometheus would not take fails the test.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;

use crate::process::AMPLE;

/// What is answered to `request`, to the end of the stream.
///
/// # Panics
/// Where it is not answered.
pub fn get(address: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(AMPLE)).unwrap();
    stream.write_all(request).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    said
}

/// Samples by name and labels.
///
/// # Panics
/// Where a line is not of the text format (version 0.0.4), a family has no type or is said twice, or nothing is there.
pub fn samples(address: &str) -> BTreeMap<String, f64> {
    let said = get(address, b"GET /metrics HTTP/1.1\r\nHost: farbus\r\n\r\n");
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("text/plain; version=0.0.4"), "{head}");
    let (mut types, mut found) = (BTreeMap::new(), BTreeMap::new());
    let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    for line in body.lines() {
        if let Some(about) = line.strip_prefix("# TYPE ") {
            let (name, kind) = about.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind) && plain(name), "{line}");
            assert_eq!(types.insert(name.to_owned(), kind.to_owned()), None, "{name} is said twice");
        } else if !line.starts_with("# HELP ") {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let name = sample.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .filter(|family| types.contains_key(*family));
            assert!(plain(name) && types.contains_key(family.unwrap_or(name)), "{line}");
            let labels = sample.strip_prefix(name).unwrap();
            assert!(labels.is_empty() || labels.starts_with('{') && labels.ends_with("\"}"), "{line}");
            assert_eq!(found.insert(sample.to_owned(), value.parse().unwrap()), None, "{sample} is said twice");
        }
    }
    assert!(!found.is_empty() && body.ends_with('\n'));
    found
}

/// The only sample of that name.
///
/// # Panics
/// Where there is none, or several.
#[track_caller]
pub fn value(samples: &BTreeMap<String, f64>, name: &str) -> f64 {
    let of_name: Vec<_> =
        samples.iter().filter(|(sample, _)| sample.split('{').next() == Some(name)).map(|(_, value)| *value).collect();
    assert_eq!(of_name.len(), 1, "{name} in {samples:?}");
    of_name[0]
}

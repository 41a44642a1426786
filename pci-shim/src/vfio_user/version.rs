//! The first message: protocol version and capabilities, a JSON text that ends with a NUL (section "VFIO_USER_VERSION").
//!
//! A client that offers `{"capabilities":{"max_msg_fds":16,"twin_socket":{"supported":true}}}` is answered `{"capabilities":{"max_msg_fds":16}}`:
//! what it did not name is not named to it, and a second socket is not used.

use rustix::io::Errno;
use serde_json::{Map, Value, json};

use super::wire::{MAJOR, MAX_DATA_BYTES, MAX_DMA_MAPS, MAX_MESSAGE_FDS, MINOR, PAGE_BYTES};

/// The longest JSON text that is read, in bytes.
pub const MAX_VERSION_DATA: usize = 16 << 10;

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Minor version spoken by both.
    pub minor: u16,
    /// The most bytes that the client takes in one `DMA_READ` or `DMA_WRITE`.
    pub client_max_data: u32,
}

/// Agrees with a client that proposed `major.minor` and sent `data`; gives what was agreed and the JSON text of the reply, NUL included.
///
/// # Errors
/// `EPROTONOSUPPORT` for another major version, `EINVAL` for data without a terminating NUL, that are no JSON object, or that name a
/// capability with a value of the wrong type.
pub fn agree(major: u16, minor: u16, data: &[u8]) -> Result<(Agreement, Vec<u8>), Errno> {
    if major != MAJOR {
        return Err(Errno::PROTONOSUPPORT);
    }
    let offered = capabilities(data)?;
    let number = |name: &str, default: u64| match offered.get(name) {
        None => Ok(default),
        Some(value) => value.as_u64().ok_or(Errno::INVAL),
    };
    number("max_msg_fds", 1)?;
    number("max_dma_maps", MAX_DMA_MAPS as u64)?;
    let client_max_data = number("max_data_xfer_size", u64::from(MAX_DATA_BYTES))?;
    let pages = number("pgsizes", PAGE_BYTES)?;
    if client_max_data == 0 || pages & PAGE_BYTES == 0 {
        return Err(Errno::INVAL);
    }
    let write_multiple = match offered.get("write_multiple") {
        None => false,
        Some(value) => value.as_bool().ok_or(Errno::INVAL)?,
    };
    let ours = [
        ("max_msg_fds", json!(MAX_MESSAGE_FDS)),
        ("max_data_xfer_size", json!(MAX_DATA_BYTES)),
        ("max_dma_maps", json!(MAX_DMA_MAPS)),
        ("pgsizes", json!(PAGE_BYTES)),
        ("write_multiple", json!(write_multiple)),
    ];
    let named: Map<String, Value> = ours
        .into_iter()
        .filter(|(name, _)| offered.contains_key(*name))
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let mut text = json!({ "capabilities": named }).to_string().into_bytes();
    text.push(0);
    let agreement = Agreement {
        minor: minor.min(MINOR),
        client_max_data: u32::try_from(client_max_data).unwrap_or(MAX_DATA_BYTES).min(MAX_DATA_BYTES),
    };
    Ok((agreement, text))
}

/// The object "capabilities" of a version's data; empty where there is none.
///
/// # Errors
/// As [`agree`].
pub fn capabilities(data: &[u8]) -> Result<Map<String, Value>, Errno> {
    if data.is_empty() {
        return Ok(Map::new());
    }
    let (last, text) = data.split_last().ok_or(Errno::INVAL)?;
    if *last != 0 || data.len() > MAX_VERSION_DATA {
        return Err(Errno::INVAL);
    }
    if text.is_empty() {
        return Ok(Map::new());
    }
    let Ok(Value::Object(mut object)) = serde_json::from_slice(text) else {
        return Err(Errno::INVAL);
    };
    match object.remove("capabilities") {
        None => Ok(Map::new()),
        Some(Value::Object(capabilities)) => Ok(capabilities),
        Some(_) => Err(Errno::INVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_names_no_capability_that_the_client_did_not() {
        let (agreement, text) = agree(
            0,
            9,
            b"{\"capabilities\":{\"max_msg_fds\":16,\"twin_socket\":{\"supported\":true}}}\0",
        )
        .unwrap();
        assert_eq!(agreement.minor, MINOR);
        assert_eq!(text, b"{\"capabilities\":{\"max_msg_fds\":16}}\0");
    }

    #[test]
    fn a_text_without_its_nul_is_refused_and_not_read_past() {
        assert_eq!(agree(0, 1, b"{}"), Err(Errno::INVAL));
        assert_eq!(agree(0, 1, b"{\0"), Err(Errno::INVAL));
        assert_eq!(agree(0, 1, b"[]\0"), Err(Errno::INVAL));
        assert_eq!(
            agree(0, 1, b"{\"capabilities\":{\"max_msg_fds\":\"x\"}}\0"),
            Err(Errno::INVAL)
        );
        assert!(agree(0, 0, b"").is_ok());
        assert_eq!(agree(1, 0, b"").unwrap_err(), Errno::PROTONOSUPPORT);
    }

    #[test]
    fn deep_nesting_does_not_overflow_the_stack() {
        let text = [vec![b'['; 15_000], vec![0]].concat();
        assert_eq!(capabilities(&text), Err(Errno::INVAL));
    }
}

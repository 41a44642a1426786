//! The hello of a link: whatever a peer sends parses to a hello that encodes to the same bytes, or is refused.
//!
//! A peer that claims versions 1 to 9 and the lender's role can be linked with a borrower of version 1, whose answer it then understands too.

use farbus_transport::link::hello::{HEADER_LEN, Header, Hello, Role, SPOKEN};

/// A peer's hello.
pub fn link_hello(bytes: &[u8]) {
    let header = bytes.first_chunk::<HEADER_LEN>().map(Header::parse);
    let Ok(hello) = Hello::parse(bytes) else { return };
    let header = header.expect("a hello has a header").expect("a hello's header parses alone");
    assert_eq!(hello.encode().expect("what was parsed can be sent"), bytes);
    for role in [Role::Lender, Role::Borrower] {
        let ours = Hello { versions: SPOKEN, role, features: u64::MAX, epoch: 1, description: Vec::new() };
        match header.agree(&ours) {
            Ok((version, features)) => {
                assert_ne!(hello.role, role, "two of one role were linked");
                assert_eq!(features, hello.features, "a feature is lost or made up");
                let sent = ours.encode().expect("ours can be sent");
                let heard = Header::parse(sent.first_chunk().expect("it has a header")).expect("the peer understands ours");
                assert_eq!(heard.agree(&hello).map(|(theirs, _)| theirs), Ok(version), "the two sides speak different versions");
            }
            Err(refused) => assert!(!refused.to_string().is_empty()),
        }
    }
}

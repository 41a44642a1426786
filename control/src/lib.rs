//! How two hosts meet.

pub mod allow;
pub mod authority;
pub mod certificate;
pub mod credentials;
pub mod identity;
pub mod store;

//! Where the device of a native function is when its function has left: at home, kept for who has its token.
//!
//! `Native::inline(nvme)?.at_home(&home)` runs the device here; when its function has left by [`crate::Attachment::keep`], `home.take()` is the device,
//! which a [`crate::lender::LenderSession`] or another native function goes on with.

use std::sync::{Arc, Mutex, PoisonError};

use crate::rest::Kept;

/// The place of one device.
#[derive(Clone, Debug, Default)]
pub struct Home(Arc<Mutex<Option<Kept>>>);

impl Home {
    /// The device, where its function has left it.
    pub fn take(&self) -> Option<Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn put(&self, kept: Kept) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
    }
}

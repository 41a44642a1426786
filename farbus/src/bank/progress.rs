//! How far a deposit or a withdrawal is, as a bar on a terminal.
//!
//! `memory  ████████░░░░  312.00 MiB/512.00 MiB  1.2 GiB/s` while it runs, and nothing when it has ended or where nobody looks.

use std::io::IsTerminal;
use std::time::Duration;

use farbus_machine_bank::deposit::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar, which goes when this is dropped.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar for what is called `name`.
    pub fn new(name: &str) -> Self {
        let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        if let Ok(style) =
            ProgressStyle::with_template("{msg:16} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}")
        {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// It is so far. May be called from several threads; the one that is furthest counts.
    pub fn show(&self, Progress { done, total }: Progress) {
        self.0.set_length(total);
        if done > self.0.position() {
            self.0.set_position(done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

//! What the device did since a machine was deposited, in words that are true: its writes are there, and the machine that restarts knows nothing of them.
//!
//! "117 writes acknowledged since the deposit of 2026-11-19 07:06:40 UTC: LBA 8-15, 1024-1031; 2 more were under way and never acknowledged: LBA 64-71".

use std::time::{SystemTime, UNIX_EPOCH};

use farbus_pci_shim::FunctionState;
use farbus_remote_dma::{Backend, BlockRange, Since};

/// Ranges that are written out; more are only counted.
const MOST_RANGES: usize = 16;

/// What `device` did since `state` was saved; `None` where its journal does not go back that far: the device was opened anew, or keeps none.
pub fn meanwhile(device: &dyn Backend, state: &FunctionState) -> Option<Since> {
    device.journal()?.since(state.rest().mark?)
}

/// For people.
pub fn say(since: Option<&Since>, saved_at: SystemTime) -> String {
    let when = date(saved_at);
    let Some(since) = since else {
        return format!(
            "what the device acknowledged since the deposit of {when} is not known: its journal began later. Any block may be newer than the machine's memory"
        );
    };
    let mut text = format!("{} writes acknowledged since the deposit of {when}", since.acknowledged);
    if !since.ranges.is_empty() {
        text.push_str(&format!(": {}", ranges(&since.ranges)));
    }
    if since.unacknowledged > 0 {
        text.push_str(&format!("; {} more were under way and never acknowledged: {}", since.unacknowledged, ranges(&since.torn)));
    }
    if since.unlisted > 0 {
        text.push_str(&format!("; of {} only the number is known, so any block may have been written", since.unlisted));
    }
    text
}

fn ranges(ranges: &[BlockRange]) -> String {
    let each =
        ranges.iter().take(MOST_RANGES).map(|range| format!("{}-{}", range.first, range.first + range.blocks.saturating_sub(1)));
    let listed = each.collect::<Vec<_>>().join(", ");
    let blocks: u64 = ranges.iter().map(|range| range.blocks).sum();
    match ranges.len().checked_sub(MOST_RANGES).filter(|more| *more > 0) {
        Some(more) => format!("LBA {listed} and {more} more ranges ({blocks} blocks in all)"),
        None => format!("LBA {listed}"),
    }
}

/// A time as `2026-11-19 07:06:40 UTC`, by the proleptic Gregorian calendar.
fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March, so that a leap day is the last of its year; an era has 400 of them.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march + 2) / 5 + 1;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_report_says_what_was_written_and_what_is_not_known() {
        let at = UNIX_EPOCH + Duration::from_secs(1_795_000_000);
        let range = |first, blocks| BlockRange { first, blocks };
        let since = Since {
            acknowledged: 117,
            unacknowledged: 2,
            ranges: vec![range(8, 8), range(1024, 8)],
            torn: vec![range(64, 8)],
            unlisted: 0,
        };
        assert_eq!(
            say(Some(&since), at),
            "117 writes acknowledged since the deposit of 2026-11-18 11:06:40 UTC: LBA 8-15, 1024-1031; 2 more were under way and never acknowledged: LBA 64-71"
        );
        assert!(say(None, at).contains("is not known"));
        let many = Since { ranges: (0..20).map(|at| range(at * 100, 10)).collect(), ..Since::default() };
        assert!(say(Some(&many), at).ends_with("and 4 more ranges (200 blocks in all)"));
        assert_eq!(date(UNIX_EPOCH), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(UNIX_EPOCH + Duration::from_secs(951_782_399)), "2000-02-28 23:59:59 UTC");
        assert_eq!(date(UNIX_EPOCH + Duration::from_secs(951_782_400)), "2000-02-29 00:00:00 UTC");
    }
}

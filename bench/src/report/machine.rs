//! Where and when figures were taken: they mean nothing without it.
//!
//! "2026-11-14 09:30 UTC, AMD EPYC 9654, 2 cores, Linux 6.18.44, farbus 0.1.0" stands in the picture, and the same in the JSON object.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// A machine at a moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// When, in UTC: "2026-11-14 09:30 UTC".
    pub date: String,
    /// The CPU's name for itself; "unknown CPU" where it has none.
    pub cpu: String,
    /// CPUs that are online; 0 where the kernel does not say.
    pub cores: usize,
    /// "Linux 6.18.44".
    pub kernel: String,
    /// The version of farbus.
    pub farbus: String,
    /// How many threads wanted to run, on average over the last minute (proc(5), /proc/loadavg); `None` where the kernel does not say.
    pub load_average: Option<f64>,
}

impl Machine {
    /// This one, now.
    pub fn here() -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // What cannot be read is said to be unknown: a report without it is better than none.
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Self::of(seconds, &read("/proc/cpuinfo"), &read("/proc/sys/kernel/osrelease"), &read("/proc/loadavg"))
    }

    /// Whether more threads wanted to run than there are cores, so that figures would be those of a struggle.
    pub fn is_busy(&self) -> bool {
        self.cores > 0 && self.load_average.is_some_and(|load| load > self.cores as f64)
    }

    /// From what the kernel says: seconds since 1970 and the texts of three files.
    fn of(seconds: u64, cpuinfo: &str, release: &str, loads: &str) -> Self {
        let fields = || cpuinfo.lines().filter_map(|line| line.split_once(':')).map(|(name, value)| (name.trim(), value.trim()));
        let cpu = fields().find(|(name, value)| *name == "model name" && !value.is_empty());
        let kernel = match release.trim() {
            "" => "Linux".to_owned(),
            release => format!("Linux {release}"),
        };
        Self {
            date: date(seconds),
            cpu: cpu.map_or_else(|| "unknown CPU".to_owned(), |(_, name)| name.to_owned()),
            cores: fields().filter(|(name, _)| *name == "processor").count(),
            kernel,
            farbus: env!("CARGO_PKG_VERSION").to_owned(),
            load_average: loads.split_whitespace().next().and_then(|load| load.parse().ok()),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { date, cpu, cores, kernel, farbus, .. } = self;
        write!(f, "{date}, {cpu}, {cores} cores, {kernel}, farbus {farbus}")
    }
}

/// Seconds since 1970 as a date of the Gregorian calendar, to the minute.
fn date(seconds: u64) -> String {
    let (mut days, minutes) = (seconds / 86_400, seconds % 86_400 / 60);
    let mut year = 1970_u64;
    loop {
        let length = 365 + u64::from(is_leap(year));
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02} {:02}:{:02} UTC", days + 1, minutes / 60, minutes % 60)
}

const fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compared with date(1), `date -u -d @951782400` say.
    #[test]
    fn dates_are_those_of_the_calendar() {
        let known = [
            (0, "1970-01-01 00:00 UTC"),
            (68_255_999, "1972-02-29 23:59 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (951_868_800, "2000-03-01 00:00 UTC"),
            (1_767_225_599, "2025-12-31 23:59 UTC"),
            (1_795_757_460, "2026-11-27 05:31 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ];
        for (seconds, expected) in known {
            assert_eq!(date(seconds), expected);
        }
    }

    #[test]
    fn what_the_kernel_does_not_say_is_unknown() {
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t: fpu\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 9654\n";
        let machine = Machine::of(0, cpuinfo, "6.18.44\n", "2.01 1.00 0.50 2/99 1234\n");
        let version = env!("CARGO_PKG_VERSION");
        let expected = format!("1970-01-01 00:00 UTC, AMD EPYC 9654, 2 cores, Linux 6.18.44, farbus {version}");
        assert_eq!(machine.to_string(), expected);
        assert_eq!((machine.load_average, machine.is_busy()), (Some(2.01), true));
        assert!(!Machine { load_average: Some(2.0), ..machine }.is_busy());
        let bare = Machine::of(0, "", "", "");
        assert_eq!((bare.load_average, bare.is_busy()), (None, false));
        assert_eq!((bare.cpu.as_str(), bare.cores, bare.kernel.as_str()), ("unknown CPU", 0, "Linux"));
        let here = Machine::here();
        assert!(here.cores > 0 && here.date.ends_with(" UTC") && here.kernel.len() > "Linux ".len(), "{here:?}");
    }
}

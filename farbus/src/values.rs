//! Values of options that are neither text nor whole numbers: times, sizes, the length of a measurement, the mode of a socket.
//!
//! `80us`, `1.5ms`, `2s`, `5m` and `30d` are times, `512M` and `2G` sizes; `80` is neither, and the error says that it needs a unit.

use std::time::Duration;

use farbus_bench::measure::LEAST_ROUNDS;
use farbus_control::allow::EVERYBODY;
use farbus_control::identity::{Name, NameError};

/// The least that a device may move in a second: a command of 4 MiB then takes 4 s.
const MIN_RATE: u64 = 1 << 20;
/// The longest time that an option takes: nobody waits longer for a register, or polls longer for nothing.
const LONGEST: Duration = Duration::from_secs(3600);
/// Seconds of a measurement, at least and at most: below, a case is over before its clock was looked at.
const MEASURED: std::ops::RangeInclusive<f64> = 0.01..=3600.0;

/// `80us`, `1.5ms`, `2s`, `5m`, at most an hour.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    match parse_age(text)? {
        time if time <= LONGEST => Ok(time),
        _ => Err(format!("{text} is longer than an hour, the longest time that is taken here")),
    }
}

/// The same without a limit: `12h`, `30d`.
pub fn parse_age(text: &str) -> Result<Duration, String> {
    const WANTED: &str = "use a number and its unit, ns, us, ms, s, m, h or d, as in 80us, 1.5ms, 10s, 5m, 12h or 30d";
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number = number.trim().parse::<f64>().map_err(|_| format!("{text:?} is no time: {WANTED}"))?;
    let seconds = match unit {
        "ns" => 1e-9,
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "" => return Err(format!("{text:?} has no unit: {WANTED}")),
        unit => return Err(format!("{unit:?} is no unit of time: {WANTED}")),
    };
    match Duration::try_from_secs_f64(number * seconds) {
        Ok(time) => Ok(time),
        _ if number > 0.0 => Err(format!("{text} is longer than can be counted")),
        _ => Err(format!("{text} is no length of time")),
    }
}

/// `512M`, `4G`, `1.5T`, or with the units' other names, `512MiB`. All are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    const WANTED: &str = "use a number and its unit, B, K, M, G or T (powers of 1024), as in 512M or 2G";
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number = number.trim().parse::<f64>().map_err(|_| format!("{text:?} is no size: {WANTED}"))?;
    let shift = match unit {
        "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        "" => return Err(format!("{text:?} has no unit: {WANTED}")),
        other => return Err(format!("{other:?} is no unit of size: {WANTED}")),
    };
    let bytes = number * (1_u64 << shift) as f64;
    // Up to 2^53 every number of bytes is a number of this kind.
    if (0.0..=(1_u64 << 53) as f64).contains(&bytes) { Ok(bytes as u64) } else { Err(format!("{text} is no size that can be")) }
}

/// Bytes in a second, of which there are some.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let rate = parse_size(text)?;
    if rate < MIN_RATE {
        Err(format!("{text} in a second is less than 1M, with which no command of a guest ends in time"))
    } else {
        Ok(rate)
    }
}

/// A time that is not zero: who waits for nothing gets nothing.
pub fn parse_wait(text: &str) -> Result<Duration, String> {
    let wait = parse_duration(text)?;
    if wait.is_zero() { Err("it must be longer than zero".to_owned()) } else { Ok(wait) }
}

/// Seconds to measure for.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| MEASURED.contains(seconds));
    seconds.ok_or_else(|| format!("it takes {} to {} seconds", MEASURED.start(), MEASURED.end()))
}

/// Pairs of measurements.
pub fn parse_pairs(text: &str) -> Result<usize, String> {
    let pairs = text.parse().ok().filter(|pairs| (LEAST_ROUNDS..=1000).contains(pairs));
    pairs.ok_or_else(|| format!("it takes {LEAST_ROUNDS} to 1000: fewer have no median that means anything"))
}

/// The name of a borrower, or everybody.
pub fn parse_allowed(text: &str) -> Result<String, NameError> {
    if text != EVERYBODY {
        text.parse::<Name>()?;
    }
    Ok(text.to_owned())
}

/// The mode of a socket: `660`, `0600`.
pub fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    let mode = mode.ok_or_else(|| format!("{text:?} is no mode: use three octal digits, as in 600 or 660"))?;
    // connect(2) asks for the right to write (unix(7)).
    if mode & 0o200 == 0 { Err("the mode must let the owner write, as 600 does".to_owned()) } else { Ok(mode) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("80us"), Ok(Duration::from_micros(80)));
        assert_eq!(parse_duration("1.5ms"), Ok(Duration::from_micros(1500)));
        assert_eq!(parse_duration("50 us"), Ok(Duration::from_micros(50)));
        for (wrong, said) in [
            ("80", "\"80\" has no unit"),
            ("us", "\"us\" is no time"),
            ("abc", "\"abc\" is no time"),
            ("", "\"\" is no time"),
            ("-1s", "no length"),
            ("1y", "\"y\" is no unit"),
            ("2h", "longer than an hour"),
            ("3601s", "longer than an hour"),
            ("10000000000000000000000000s", "longer than can be counted"),
        ] {
            let error = parse_duration(wrong).unwrap_err();
            assert!(error.contains(said), "{wrong}: {error}");
            assert!(!error.contains("unit") || error.contains("ns, us, ms, s, m, h or d"), "{error}");
        }
        assert_eq!((parse_duration("5m"), parse_duration("1h")), (Ok(Duration::from_secs(300)), Ok(LONGEST)));
        assert_eq!((parse_age("30d"), parse_age("12h")), (Ok(Duration::from_secs(30 * 86_400)), Ok(Duration::from_secs(43_200))));
        for wrong in ["", "30", "d", "-1d", "nans", "infd", "99999999999999999999d", "ä"] {
            assert!(parse_age(wrong).is_err(), "{wrong}");
        }
        assert!(parse_wait("0us").is_err() && parse_wait("1us").is_ok());
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!((parse_size("4GiB"), parse_size("512 MiB"), parse_size("7B")), (Ok(4 << 30), Ok(512 << 20), Ok(7)));
        assert_eq!((parse_size("4G"), parse_size("512M"), parse_size("1.5K")), (Ok(4 << 30), Ok(512 << 20), Ok(1536)));
        for wrong in ["", "GiB", "4GB", "7", "1g", "-1M", "nanM", "infT", "99999999999TiB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_rate_leaves_time_for_a_command() {
        assert_eq!((parse_rate("1M"), parse_rate("2G")), (Ok(1 << 20), Ok(2 << 30)));
        for wrong in ["0B", "1023K", "", "M"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_measurement_has_a_length_that_means_something() {
        assert_eq!((parse_seconds("0.01"), parse_seconds("3600")), (Ok(0.01), Ok(3600.0)));
        for wrong in ["0", "-1", "nan", "inf", "1e300", "3601", "0.001", "soon", ""] {
            assert_eq!(parse_seconds(wrong), Err("it takes 0.01 to 3600 seconds".to_owned()), "{wrong}");
        }
        assert!(parse_pairs("4").is_err() && parse_pairs("5") == Ok(5) && parse_pairs("1001").is_err());
    }

    #[test]
    fn a_mode_is_octal_and_lets_its_owner_connect() {
        assert_eq!((parse_mode("600"), parse_mode("0660")), (Ok(0o600), Ok(0o660)));
        for wrong in ["", "8", "rw", "1777", "-1", "440", "000"] {
            assert!(parse_mode(wrong).is_err(), "{wrong}");
        }
    }
}

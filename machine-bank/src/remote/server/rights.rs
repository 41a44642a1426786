//! Who may read and deposit which machines: patterns over their names.
//!
//! `Rights::new(["web-*"], ["web-7"])` reads `web-1` and `web-7`, deposits `web-7`, and has never heard of `db`.

use std::fmt;
use std::str::FromStr;

/// Machines by their names: `*` stands for any letters, `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether it is for this machine.
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name) = (self.0.as_bytes(), name.as_bytes());
        let (mut at, mut in_name) = (0, 0);
        // Where the last star is, and how much of the name it stands for so far.
        let mut star = None;
        while in_name < name.len() {
            match pattern.get(at) {
                Some(b'*') => {
                    star = Some((at, in_name));
                    at += 1;
                }
                Some(letter) if *letter == b'?' || *letter == name[in_name] => {
                    at += 1;
                    in_name += 1;
                }
                _ => match &mut star {
                    Some((star, from)) => {
                        *from += 1;
                        (at, in_name) = (*star + 1, *from);
                    }
                    None => return false,
                },
            }
        }
        pattern[at..].iter().all(|letter| *letter == b'*')
    }

    /// Whether it is for every machine.
    pub fn is_all(&self) -> bool {
        self.0.bytes().all(|letter| letter == b'*')
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good =
            (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-*?".contains(&byte));
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is no pattern for machines: use 1 to 64 letters, digits, '.', '_' and '-', '*' for any and '?' for one of them"
            ))
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a client may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Machines that it may list, look at and withdraw.
    pub read: Vec<Pattern>,
    /// Machines that it may deposit.
    pub write: Vec<Pattern>,
}

impl Rights {
    /// Everything.
    pub fn all() -> Self {
        let all = || vec![Pattern("*".to_owned())];
        Self { read: all(), write: all() }
    }

    /// Whether it may read a machine.
    pub fn reads(&self, machine: &str) -> bool {
        self.read.iter().any(|pattern| pattern.matches(machine))
    }

    /// Whether it may read every machine.
    pub fn reads_all(&self) -> bool {
        self.read.iter().any(Pattern::is_all)
    }

    /// Whether it may deposit a machine.
    pub fn writes(&self, machine: &str) -> bool {
        self.write.iter().any(|pattern| pattern.matches(machine))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_for_what_it_says_and_nothing_else() {
        for (pattern, yes, no) in [
            ("web-*", &["web-", "web-7"][..], &["web", "xweb-7", "db"][..]),
            ("*", &["a", "vm7"], &[]),
            ("vm?", &["vm7"], &["vm", "vm77"]),
            ("*-7-*x", &["a-7-x", "-7--7-yx"], &["a-7-y", "7-x"]),
            ("vm7", &["vm7"], &["vm7x", "vm"]),
        ] {
            let parsed: Pattern = pattern.parse().unwrap();
            assert!(yes.iter().all(|name| parsed.matches(name)), "{pattern}");
            assert!(!no.iter().any(|name| parsed.matches(name)), "{pattern}");
        }
        assert!("".parse::<Pattern>().is_err() && "a/b".parse::<Pattern>().is_err());
        assert!(Rights::all().reads_all() && !Rights::default().reads("vm7"));
    }
}

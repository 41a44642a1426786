//! Which cores a thread may be told to run on.
//!
//! `--core 99` on a machine of two is refused with "this process may run on cores 0 to 1", before anything is opened: a session that began on
//! another core than was asked for would only be noticed by its figures.

use anyhow::Context;
use farbus_bench::measure::cores;

use crate::failure::misuse;

/// Refuses a core that this process may not use.
pub fn check_core(core: usize) -> anyhow::Result<()> {
    let all = cores().context("cannot tell which cores there are")?;
    if all.contains(&core) {
        return Ok(());
    }
    Err(misuse(format!("there is no core {core} for this process"), format!("it may run on cores {}", ranges(&all))))
}

/// "0 to 3, 6, 8 to 9" of ascending numbers.
fn ranges(ascending: &[usize]) -> String {
    let runs = ascending.chunk_by(|a, b| a + 1 == *b);
    let texts: Vec<_> = runs
        .filter_map(|run| match run {
            [] => None,
            [one] => Some(one.to_string()),
            [first, .., last] => Some(format!("{first} to {last}")),
        })
        .collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_cores_are_named_by_their_ends() {
        assert_eq!(ranges(&[0, 1, 2, 3, 6, 8, 9]), "0 to 3, 6, 8 to 9");
        assert_eq!(ranges(&[5]), "5");
    }

    #[test]
    fn a_core_that_is_there_is_taken_and_one_that_is_not_is_refused() {
        let all = cores().unwrap();
        assert!(check_core(all[0]).is_ok());
        assert!(check_core(usize::MAX).is_err());
    }
}

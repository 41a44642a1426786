//! Numbers of things for people: one page, two pages.
//!
//! `count(1, "page")` is "1 page" and `count(0, "pack")` "0 packs".

/// `number` things of a kind whose plural has an s.
pub fn count(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_one_and_all_others_are_many() {
        assert_eq!([0, 1, 2].map(|number| count(number, "page")), ["0 pages", "1 page", "2 pages"]);
    }
}

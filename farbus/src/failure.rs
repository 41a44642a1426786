//! What a command that fails says: one story for people, one object for machines, and what to do next.
//!
//! `Err(refused).advise("cannot lend there", "choose another path")` becomes two lines on standard error, and with `--json` also
//! `{"event":"error","error":"cannot lend there: /run/x is in use by another process","causes":["/run/x is …"],"hint":"choose another path"}`.

use std::error::Error;
use std::fmt;

use serde_json::{Value, json};

/// An error with advice.
#[derive(Debug)]
struct Advised {
    what: String,
    hint: String,
    cause: Option<anyhow::Error>,
    misuse: bool,
}

impl fmt::Display for Advised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl Error for Advised {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(AsRef::as_ref)
    }
}

/// Says what could not be done and what to do about it.
pub trait Advise<T> {
    /// `what` failed; `hint` may help.
    ///
    /// # Errors
    /// The error that it was, with both.
    fn advise(self, what: impl Into<String>, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Advise<T> for Result<T, E> {
    fn advise(self, what: impl Into<String>, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|cause| {
            anyhow::Error::new(Advised { what: what.into(), hint: hint.into(), cause: Some(cause.into()), misuse: false })
        })
    }
}

/// An error that has no cause but the user's wish.
pub fn refusal(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Advised { what: what.into(), hint: hint.into(), cause: None, misuse: false })
}

/// Arguments that make no sense: each is right by itself, but not with the others, or not on this host.
pub fn misuse(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Advised { what: what.into(), hint: hint.into(), cause: None, misuse: true })
}

/// Whether the arguments are to blame.
pub fn is_misuse(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Advised>().is_some_and(|advised| advised.misuse)
}

/// An error and its causes, each said once: many an error's own text ends with its cause.
pub fn story(error: &anyhow::Error) -> String {
    let mut story = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !story.ends_with(&cause) {
            story = format!("{story}: {cause}");
        }
    }
    story
}

/// What to do about it, where somebody knew.
pub fn hint(error: &anyhow::Error) -> Option<&str> {
    error.downcast_ref::<Advised>().map(|advised| advised.hint.as_str())
}

/// What people are told: for arguments that make no sense as the parser of arguments tells of those that it finds itself.
pub fn for_people(error: &anyhow::Error) -> String {
    let (story, hint) = (story(error), hint(error));
    if is_misuse(error) {
        let tip = hint.map_or(String::new(), |hint| format!("  tip: {hint}\n\n"));
        return format!("error: {story}\n\n{tip}For more information, try '--help'.");
    }
    format!("farbus: {story}{}", hint.map_or(String::new(), |hint| format!("\nhint: {hint}")))
}

/// The same for machines: the whole story, the causes one by one from the outermost, and the advice or null.
pub fn fields(error: &anyhow::Error) -> Value {
    let causes: Vec<_> = error.chain().skip(1).map(ToString::to_string).collect();
    json!({ "error": story(error), "causes": causes, "hint": hint(error) })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_is_told_once_and_advice_survives_what_is_put_before_it() {
        let cause = std::io::Error::other("the disk is on fire");
        let advised = Err::<(), _>(cause).advise("cannot read", "use water").context("the borrowed device");
        let error = advised.unwrap_err();
        assert_eq!(story(&error), "the borrowed device: cannot read: the disk is on fire");
        assert_eq!(hint(&error), Some("use water"));
        assert_eq!(fields(&error)["causes"], json!(["cannot read", "the disk is on fire"]));

        let plain = Err::<(), _>(refusal("no such core", "name another")).context("no such core").unwrap_err();
        assert_eq!(story(&plain), "no such core");
        assert!(!is_misuse(&plain) && is_misuse(&misuse("no such core", "name another").context("cannot lend")));
        let nonsense = for_people(&misuse("no such core", "name another"));
        assert_eq!(nonsense, "error: no such core\n\n  tip: name another\n\nFor more information, try '--help'.");
        assert_eq!(for_people(&refusal("no room", "make some")), "farbus: no room\nhint: make some");
        assert_eq!(fields(&anyhow::anyhow!("alone")), json!({ "error": "alone", "causes": [], "hint": null }));
    }
}

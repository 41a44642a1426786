//! The generator of transport/src/verbs/sys.rs, and what of libibverbs the verbs fabric uses.
//!
//! `cargo run` in this folder writes the file after a source of the fabric has gained a `use super::sys::IBV_WR_SEND`; a test compares the two, so that
//! neither a forgotten run nor a header with another struct goes unseen.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use bindgen::callbacks::{EnumVariantCustomBehavior, EnumVariantValue, ParseCallbacks};
use bindgen::{Builder, EnumVariation, RustTarget};

/// The enumerations of verbs.h whose numbers the fabric uses; of each, only those numbers are taken.
const ENUMERATIONS: &str = "ibv_(access_flags|device_cap_flags|event_type|gid_type|port_state|qp_attr_mask|qp_state|qp_type|send_flags|wc_opcode|wc_status|wr_opcode)";

/// Structs of which the fabric only holds pointers: their size is known, their fields are not.
const OPAQUE: &str = "_?ibv_(ah|cq|device|device_ops|mw_bind|pd|srq|wq)";

/// What the libc crate has.
const OF_LIBC: &str = "_*pthread_.*|__atomic_wide_counter.*";

const OPENING: &str = "\
//! The types and constants of libibverbs that farbus uses, as Rust sees them. The generator (tests/oracle/src/lib.rs) writes this file; nobody edits it.
//!
//! For example `ibv_wc` is one completion: `wr_id` names the work request, `status` 0 says that it was carried out.
#![allow(missing_docs, non_camel_case_types, non_upper_case_globals, dead_code, clippy::all)]

use libc::{pthread_cond_t, pthread_mutex_t};";

/// The root of the repository.
pub fn root() -> &'static Path {
    let oracle = Path::new(env!("CARGO_MANIFEST_DIR"));
    oracle.ancestors().nth(2).unwrap_or(oracle)
}

/// Where the bindings are.
pub fn bindings_path() -> PathBuf {
    root().join("transport/src/verbs/sys.rs")
}

/// Keeps the constants that are used.
#[derive(Debug)]
struct Only(BTreeSet<String>);

impl ParseCallbacks for Only {
    fn enum_variant_behavior(&self, _: Option<&str>, name: &str, _: EnumVariantValue) -> Option<EnumVariantCustomBehavior> {
        (!self.0.contains(name)).then_some(EnumVariantCustomBehavior::Hide)
    }
}

/// The bindings, from the header that is installed.
///
/// # Errors
/// What bindgen, rustfmt or the file system says; or which used name the header, or the lists above, do not have.
pub fn generate() -> io::Result<String> {
    let names = used()?;
    let types: Vec<&str> = names.iter().map(String::as_str).filter(|name| name.starts_with("ibv_")).collect();
    let generated = Builder::default()
        .header_contents("farbus.h", "#include <infiniband/verbs.h>")
        .disable_header_comment()
        .raw_line(OPENING)
        .rust_target(RustTarget::stable(80, 0).map_err(|error| io::Error::other(error.to_string()))?)
        .use_core()
        .default_enum_style(EnumVariation::Consts)
        .prepend_enum_name(false)
        .generate_comments(false)
        .layout_tests(false)
        .allowlist_type(types.join("|"))
        .allowlist_type(ENUMERATIONS)
        .opaque_type(OPAQUE)
        .blocklist_type(OF_LIBC)
        .parse_callbacks(Box::new(Only(names.clone())))
        .rustfmt_configuration_file(Some(root().join("rustfmt.toml")))
        .generate()
        .map_err(io::Error::other)?
        .to_string();
    let mut absent = String::new();
    for name in names {
        let defined = ["const", "type", "struct", "union"].iter().any(|kind| {
            generated
                .match_indices(&format!("pub {kind} {name}"))
                .any(|(at, found)| !generated[at + found.len()..].starts_with(in_a_name))
        });
        if !defined {
            write!(absent, " {name}").map_err(io::Error::other)?;
        }
    }
    if absent.is_empty() {
        Ok(generated)
    } else {
        Err(io::Error::other(format!("verbs.h, or ENUMERATIONS in tests/oracle/src/lib.rs, lacks{absent}")))
    }
}

/// The functions that the fabric looks up, as the header declares them: "ibv_dealloc_pd" and "fn(*mut ibv_pd) -> c_int".
///
/// # Errors
/// What bindgen says.
pub fn declared(functions: &[&str]) -> io::Result<BTreeMap<String, String>> {
    let generated = Builder::default()
        .header_contents("farbus.h", "#include <infiniband/verbs.h>")
        .generate_comments(false)
        .layout_tests(false)
        .allowlist_function(functions.join("|"))
        .ctypes_prefix("")
        .generate()
        .map_err(io::Error::other)?
        .to_string();
    let one_line = generated.split_whitespace().collect::<Vec<_>>().join(" ");
    let signatures = one_line.split("pub fn ").skip(1).filter_map(|after| {
        let (name, after) = after.split_once('(')?;
        let (arguments, after) = after.split_once(')')?;
        let types: Vec<_> = arguments.split(',').filter_map(|argument| Some(argument.split_once(':')?.1.trim())).collect();
        let result = after.split_once(';')?.0;
        Some((name.to_owned(), format!("fn({}){result}", types.join(", ")).replace("::", "")))
    });
    Ok(signatures.collect())
}

fn in_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The names that the sources of the fabric take from `sys`.
///
/// # Errors
/// A source that cannot be read.
pub fn used() -> io::Result<BTreeSet<String>> {
    let path = bindings_path();
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path.parent().unwrap_or(&path))? {
        let source = entry?.path();
        if source != path && source.extension().is_some_and(|extension| extension == "rs") {
            names.extend(names_from_sys(&std::fs::read_to_string(source)?));
        }
    }
    Ok(names)
}

/// What stands behind `sys::` in a source, alone or in braces.
fn names_from_sys(source: &str) -> BTreeSet<String> {
    let code: String = source.lines().filter(|line| !line.trim_start().starts_with("//")).flat_map(|line| [line, "\n"]).collect();
    let mut names = BTreeSet::new();
    for after in code.split("sys::").skip(1) {
        let end = if after.starts_with('{') { after.find('}') } else { after.find(|c: char| !in_a_name(c)) };
        let words = after[..end.unwrap_or(after.len())].split(|c: char| !in_a_name(c));
        // Not `self`, nor the empty words between commas.
        names.extend(words.filter(|word| word.to_ascii_lowercase().starts_with("ibv_")).map(str::to_owned));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_alone_and_in_braces_and_not_in_comments() {
        let source =
            "use super::sys::{\n    self, IBV_A, ibv_b,\n};\n// sys::IBV_NOT\nlet x = super::sys::IBV_C + sys::IBV_D;\nmod sys;";
        assert_eq!(names_from_sys(source), ["IBV_A", "IBV_C", "IBV_D", "ibv_b"].map(str::to_owned).into());
    }
}

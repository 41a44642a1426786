//! transport/src/verbs/sys.rs is what its generator writes from the installed header, and library.rs beside it calls what the header declares.
//!
//! A libibverbs-dev whose `ibv_port_attr` has gained a field fails here with the line of the file that differs.

use farbus_oracle::{bindings_path, declared, generate};

#[test]
fn the_bindings_are_what_the_generator_writes() {
    let (tree, generated) = (std::fs::read_to_string(bindings_path()).unwrap(), generate().unwrap());
    let differs = tree.lines().zip(generated.lines()).position(|(old, new)| old != new);
    let at = differs.unwrap_or(tree.lines().count().min(generated.lines().count()));
    let line = |text: &str| text.lines().nth(at).map(str::to_owned);
    assert!(
        tree == generated,
        "line {} of {} is {:?} and would be {:?}: `cargo run` in tests/oracle, and look at what changed",
        at + 1,
        bindings_path().display(),
        line(&tree),
        line(&generated)
    );
}

/// The lines `close_device: c"ibv_close_device" = fn(*mut ibv_context) -> c_int;` of library.rs, as name and type.
fn looked_up(source: &str) -> Vec<(&str, &str)> {
    source.lines().filter_map(|line| line.trim().split_once(": c\"")?.1.strip_suffix(';')?.split_once("\" = ")).collect()
}

#[test]
fn the_entry_points_have_the_types_of_the_header() {
    let source = std::fs::read_to_string(bindings_path().with_file_name("library.rs")).unwrap();
    let looked_up = looked_up(&source);
    assert!(looked_up.len() >= 20, "{looked_up:?}");
    let declared = declared(&looked_up.iter().map(|(name, _)| *name).collect::<Vec<_>>()).unwrap();
    for (name, ours) in looked_up {
        let header = declared.get(name).unwrap_or_else(|| panic!("verbs.h does not declare {name}"));
        // The header hides the struct's size from callers of the function, whose place an inline one takes; it fills what ibv_port_attr begins with.
        let header = header.replace("_compat_ibv_port_attr", "ibv_port_attr");
        assert_eq!(ours, header, "{name} in library.rs, and in verbs.h");
    }
}

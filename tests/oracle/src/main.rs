//! Writes transport/src/verbs/sys.rs anew: `cargo run` in tests/oracle, after the fabric began to use another name of libibverbs.
//!
//! It needs libclang and libibverbs-dev (`ci/run oracle` installs them); building farbus needs neither.

fn main() -> std::io::Result<()> {
    let path = farbus_oracle::bindings_path();
    std::fs::write(&path, farbus_oracle::generate()?)?;
    println!("wrote {}", path.display());
    Ok(())
}

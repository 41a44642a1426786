//! placeholder
pub fn run(_: &crate::cli::BenchArgs) -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}

//! placeholder
pub fn run(_: &crate::cli::DemoArgs) -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}

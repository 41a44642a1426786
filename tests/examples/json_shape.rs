//! Judges what `farbus demo --json` or any `farbus bench … --json` printed, as it comes on standard input.
//!
//! `farbus demo --json | cargo run -p farbus-tests --example json_shape demo` fails with "cases: read-128k is missing" where one is missing,
//! so that a script that reads the object keeps working.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

const CASES: [&str; 6] =
    ["randread-4k-qd1", "randwrite-4k-qd1", "randread-4k-qd32", "randwrite-4k-qd32", "read-128k", "write-128k"];

fn main() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("not one JSON object: {text:.200}"))?;
    let object = value.as_object().context("not an object")?;
    match std::env::args().nth(1).as_deref() {
        Some("demo") => demo(object),
        Some("bench") => bench(object, "shm"),
        Some("bench-soft-roce") => bench(object, "soft-roce"),
        Some("bench-bank") => bench(object, "bank"),
        other => bail!("usage: json_shape demo|bench|bench-soft-roce|bench-bank, not {other:?}"),
    }
}

fn demo(object: &Map<String, Value>) -> Result<()> {
    ensure!(text(object, "fabric")? == "shm", "fabric is {:?}", object["fabric"]);
    ensure!(object.get("verified") == Some(&Value::Bool(true)), "verified is {:?}", object.get("verified"));
    ensure!(number(object, "bytes_verified")? > 0.0, "nothing was verified");
    let cases = array(object, "cases")?;
    for name in CASES {
        let case = cases.iter().find(|case| case["name"] == name).with_context(|| format!("cases: {name} is missing"))?;
        let case = case.as_object().context("a case is no object")?;
        for side in ["native", "remote"] {
            let figures = case.get(side).and_then(Value::as_object).with_context(|| format!("{name}: no {side}"))?;
            for figure in ["iops", "p50_ns", "p99_ns"] {
                ensure!(number(figures, figure)? > 0.0, "{name}: {side}.{figure} is {:?}", figures[figure]);
            }
        }
        for ratio in ["iops_ratio", "p50_ratio"] {
            ensure!(number(case, ratio)? > 0.0, "{name}: {ratio} is {:?}", case[ratio]);
            let spread = format!("{ratio}_spread");
            ensure!(number(case, &spread)? >= 0.0, "{name}: {spread} is {:?}", case[&spread]);
        }
    }
    let machine = object.get("machine").and_then(Value::as_object).context("no machine")?;
    for key in ["date", "cpu", "kernel", "farbus"] {
        ensure!(!text(machine, key)?.is_empty(), "machine.{key} is empty");
    }
    ensure!(number(machine, "cores")? > 0.0 && machine.contains_key("load_average"), "machine is {machine:?}");
    ensure!(cases.len() == CASES.len(), "{} cases instead of {}", cases.len(), CASES.len());
    Ok(())
}

fn bench(object: &Map<String, Value>, suite: &str) -> Result<()> {
    ensure!(text(object, "suite")? == suite, "suite is {:?}", object["suite"]);
    let rows = array(object, "rows")?;
    ensure!(rows.len() >= 10, "only {} rows", rows.len());
    for row in rows {
        let row = row.as_object().context("a row is no object")?;
        let case = text(row, "case")?;
        let shape = || -> Result<()> {
            text(row, "unit")?;
            // Other people's programs may be missing: such a row says so. Perftest comes with the lab.
            if suite != "bank" || !row.get("value").is_some_and(Value::is_null) {
                let measured = number(row, "value");
                measured.with_context(|| format!("not measured: {:?}", row.get("note")))?;
            }
            // Beside them a row may have no verdict, and then says why: too noisy, or not there.
            if suite != "shm" && row.get("meets").is_some_and(Value::is_null) {
                text(row, "note")?;
            } else {
                ensure!(row.get("meets").is_some_and(Value::is_boolean), "meets is {:?}", row.get("meets"));
            }
            // What is counted is the same on every machine.
            if row.get("unit").and_then(Value::as_str) == Some("per operation") && suite == "soft-roce" {
                ensure!(row.get("meets") == Some(&Value::Bool(true)), "{} misses {:?}", row["value"], row.get("target"));
            }
            // Counts, such as of system calls, have no reference but a target.
            for key in ["reference", "reference_value", "ratio", "target"] {
                ensure!(row.contains_key(key), "{key} is missing");
            }
            Ok(())
        };
        shape().with_context(|| format!("row {case}"))?;
    }
    Ok(())
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str> {
    object.get(key).and_then(Value::as_str).with_context(|| format!("{key} is {:?}, not a text", object.get(key)))
}

fn number(object: &Map<String, Value>, key: &str) -> Result<f64> {
    object.get(key).and_then(Value::as_f64).with_context(|| format!("{key} is {:?}, not a number", object.get(key)))
}

fn array<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a Vec<Value>> {
    object.get(key).and_then(Value::as_array).with_context(|| format!("{key} is {:?}, not an array", object.get(key)))
}

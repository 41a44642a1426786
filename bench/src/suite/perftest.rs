//! perftest (linux-rdma/perftest) as the reference: a server and a client process over one device, and the figure that the client prints.
//!
//! `perftest.run(Test::WriteLatency, 8, 2000)` starts `ib_write_lat -s 8 -n 2000` on the second core, waits until it listens, starts its client on
//! the first, and answers 17,870 from "8  2000  16.69  448.32  17.87 …", whose fifth column is headed `t_typical[usec]`.

use std::io::Read;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use farbus_transport::verbs::DeviceChoice;

use crate::measure::pin_to;

/// A server that does not listen by then has failed in a way that it does not tell.
const LISTEN_LIMIT: Duration = Duration::from_secs(20);
/// A run that is not over by then never will be.
const RUN_LIMIT: Duration = Duration::from_secs(120);
/// How often the end of a process, and that a server listens, is looked for: seldom enough to disturb nothing.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One of perftest's programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// `ib_write_lat`: half of a round trip of writes that each side polls its memory for.
    WriteLatency,
    /// `ib_read_lat`: from the post of a read to its completion.
    ReadLatency,
    /// `ib_write_bw`: writes, 128 in flight.
    WriteBandwidth,
    /// `ib_read_bw`: reads, 128 in flight.
    ReadBandwidth,
}

impl Test {
    const ALL: [Self; 4] = [Self::WriteLatency, Self::ReadLatency, Self::WriteBandwidth, Self::ReadBandwidth];

    fn program(self) -> &'static str {
        match self {
            Self::WriteLatency => "ib_write_lat",
            Self::ReadLatency => "ib_read_lat",
            Self::WriteBandwidth => "ib_write_bw",
            Self::ReadBandwidth => "ib_read_bw",
        }
    }

    /// How the columns begin that hold the figures.
    fn columns(self) -> [&'static str; 2] {
        match self {
            // The median (its source calls it so).
            Self::WriteLatency | Self::ReadLatency => ["t_typical", "t_min"],
            Self::WriteBandwidth | Self::ReadBandwidth => ["BW average", "BW peak"],
        }
    }
}

/// What a run found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// The median in nanoseconds, or the average in bytes per second.
    pub typical: f64,
    /// The best single one.
    pub best: f64,
}

/// Where perftest runs.
#[derive(Clone, Debug)]
pub struct Perftest {
    device: String,
    port: u8,
    gid: Option<u32>,
    here: usize,
    there: usize,
}

impl Perftest {
    /// Over the device, port and address of `choice`, which must name a device; the client on core `here`, the server on core `there`.
    ///
    /// # Errors
    /// Where perftest is not installed, with the package that holds it.
    pub fn new(choice: &DeviceChoice, here: usize, there: usize) -> Result<Self> {
        for test in Test::ALL {
            let program = test.program();
            let folders = std::env::var_os("PATH").unwrap_or_default();
            if !std::env::split_paths(&folders).any(|folder| folder.join(program).is_file()) {
                bail!("the reference {program} is not installed; on Debian: apt-get install perftest");
            }
        }
        let device = choice.device.clone().context("perftest needs the device's name")?;
        Ok(Self { device, port: choice.port.unwrap_or(1), gid: choice.gid, here, there })
    }

    /// One run.
    ///
    /// # Errors
    /// Where a process fails, is late, or prints something else.
    pub fn run(&self, test: Test, bytes: u64, iterations: u64) -> Result<Figures> {
        self.try_run(test, bytes, iterations).with_context(|| format!("{} failed", test.program()))
    }

    fn try_run(&self, test: Test, bytes: u64, iterations: u64) -> Result<Figures> {
        let port = free_port()?;
        let mut server = self.start(test, bytes, iterations, port, None)?;
        let started = Instant::now();
        while !listens(port)? {
            if started.elapsed() > LISTEN_LIMIT {
                bail!("its server does not listen");
            }
            if let Some(said) = server.ended()? {
                bail!("its server ended: {said}");
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let mut client = self.start(test, bytes, iterations, port, Some("127.0.0.1"))?;
        let output = client.output()?;
        server.output()?;
        figures(test, &output)
    }

    fn start(&self, test: Test, bytes: u64, iterations: u64, port: u16, server: Option<&str>) -> Result<Process> {
        // A process begins on the core of the thread that starts it.
        let _pinned = pin_to(if server.is_some() { self.here } else { self.there })?;
        let mut command = Command::new(test.program());
        // -F: do not stop to complain of clocks that change their speed.
        command.args(["-F", "-d", &self.device, "-i", &self.port.to_string()]);
        command.args(["-s", &bytes.to_string(), "-n", &iterations.to_string(), "-p", &port.to_string()]);
        if let Some(gid) = self.gid {
            command.args(["-x", &gid.to_string()]);
        }
        let child = command.args(server).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Process(child))
    }
}

/// A process that ends with this value.
struct Process(Child);

impl Process {
    /// What it said, once it has ended.
    fn ended(&mut self) -> Result<Option<String>> {
        Ok(match self.0.try_wait()? {
            Some(status) => Some(format!("{status}: {}", self.said()?)),
            None => None,
        })
    }

    fn said(&mut self) -> Result<String> {
        let mut said = String::new();
        if let Some(mut pipe) = self.0.stderr.take() {
            pipe.read_to_string(&mut said)?;
        }
        Ok(said.trim().replace('\n', "; "))
    }

    /// Waits for its good end; what it printed.
    fn output(&mut self) -> Result<String> {
        let started = Instant::now();
        // It prints less than a pipe holds, so it does not wait for its reader.
        let status = loop {
            if let Some(status) = self.0.try_wait()? {
                break status;
            }
            if started.elapsed() > RUN_LIMIT {
                bail!("it did not end within {} s", RUN_LIMIT.as_secs());
            }
            std::thread::sleep(LOOK_EVERY);
        };
        if !status.success() {
            bail!("{status}: {}", self.said()?);
        }
        let mut output = String::new();
        self.0.stdout.take().context("a process without its output")?.read_to_string(&mut output)?;
        Ok(output)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, or nobody wants what it would still do.
        if self.0.kill().is_ok() {
            drop(self.0.wait());
        }
    }
}

/// A port that nobody listens on at this moment.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Whether a process of this host listens on `port`; to connect to it would be taken for the client.
fn listens(port: u16) -> Result<bool> {
    // proc_pid_net(5): "local_address" is ADDRESS:PORT in hexadecimal, state 0A is "listen".
    const LISTEN: &str = "0A";
    let suffix = format!(":{port:04X}");
    for name in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let path = PathBuf::from(name);
        if path.exists() {
            let table = std::fs::read_to_string(path)?;
            let listening = |line: &str| {
                let mut fields = line.split_whitespace().skip(1);
                fields.next().is_some_and(|local| local.ends_with(&suffix)) && fields.nth(1) == Some(LISTEN)
            };
            if table.lines().any(listening) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The figures of a client's table: the first line of numbers under the heading that begins with `#bytes`.
fn figures(test: Test, output: &str) -> Result<Figures> {
    let mut lines = output.lines().skip_while(|line| !line.trim_start().starts_with("#bytes"));
    let heading = lines.next().ok_or_else(|| anyhow!("no table in its output: {output:?}"))?;
    let mut rows = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.first().is_some_and(|first| first.parse::<u64>().is_ok()));
    let (columns, row) = (columns(heading), row.context("a table without a row")?);
    let [typical, best] = test.columns().map(|column| figure(column, &columns, &row));
    Ok(Figures { typical: typical?, best: best? })
}

/// The figure in the column that begins with `wanted`, in nanoseconds or bytes per second.
fn figure(wanted: &str, columns: &[String], row: &[&str]) -> Result<f64> {
    let at = columns.iter().position(|column| column.starts_with(wanted));
    let at = at.ok_or_else(|| anyhow!("no column {wanted} in {columns:?}"))?;
    let number = row.get(at).and_then(|cell| cell.parse::<f64>().ok());
    let number = number.ok_or_else(|| anyhow!("no number in column {at} of {row:?}"))?;
    let scale = match columns[at].split_once('[').map(|(_, unit)| unit.trim_end_matches(']')) {
        Some("usec") => 1e3,
        // Its source: 0x100000 bytes.
        Some("MB/sec" | "MiB/sec") => f64::from(1 << 20),
        Some("Gb/sec") => 1e9 / 8.0,
        other => bail!("{wanted} is in {other:?}, which is no unit that is known"),
    };
    // Not a number is not positive either.
    if number > 0.0 { Ok(number * scale) } else { bail!("{number} is no figure") }
}

/// The headings of columns: words, but for "99% percentile[usec]" and "BW average[MB/sec]", which are two words each.
fn columns(heading: &str) -> Vec<String> {
    let mut columns: Vec<String> = Vec::new();
    for word in heading.split_whitespace() {
        match columns.last_mut() {
            Some(last) if last == "BW" || last.ends_with('%') => *last = format!("{last} {word}"),
            _ => columns.push(word.to_owned()),
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: &str = "
 remote address: LID 0000 QPN 0x0012 PSN 0xd1d7a2 RKey 0x0002cd VAddr 0x0055627c53b000
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec] 
Conflicting CPU frequency values detected: 2000.000000 != 1500.000000. CPU Frequency is not max.
 8       1000          16.69          448.32       17.87    \t       22.91       \t19.00  \t\t152.49  \t\t448.32 
---------------------------------------------------------------------------------------
";
    const BANDWIDTH: &str = "
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      1000             54.65              48.52  \t\t   0.000776
";

    #[test]
    fn figures_are_found_by_their_headings_and_turned_into_our_units() {
        assert_eq!(figures(Test::WriteLatency, LATENCY).unwrap(), Figures { typical: 17_870.0, best: 16_690.0 });
        let rate = figures(Test::ReadBandwidth, BANDWIDTH).unwrap();
        assert!((rate.typical - 48.52 * 1_048_576.0).abs() < 1.0 && rate.best > rate.typical, "{rate:?}");
        assert!((rate.typical / 65536.0 - 776.0).abs() < 1.0, "as many bytes as its message rate says");
        assert_eq!(figures(Test::WriteBandwidth, &BANDWIDTH.replace("MB/sec", "Gb/sec")).unwrap().typical, 48.52e9 / 8.0);
    }

    #[test]
    fn what_is_no_figure_is_refused_with_what_was_there() {
        let refused = |test, output: &str| figures(test, output).unwrap_err().to_string();
        assert!(refused(Test::WriteLatency, "Couldn't connect to 127.0.0.1").contains("no table"));
        assert!(refused(Test::WriteLatency, BANDWIDTH).contains("no column t_typical"));
        assert!(refused(Test::WriteLatency, &LATENCY.replace("usec", "cycles")).contains("cycles"));
        assert!(refused(Test::WriteLatency, &LATENCY.replace("17.87", "nan")).contains("no figure"));
        assert!(refused(Test::ReadBandwidth, BANDWIDTH.split("65536").next().unwrap()).contains("without a row"));
    }

    #[test]
    fn a_listener_is_seen_without_being_connected_to() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port).unwrap());
        drop(listener);
        assert!(!listens(port).unwrap());
    }
}

//! The receiving process, and how the sending one talks to it: lines over its standard input and output.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use crossbeam_channel::{Receiver, Sender};
use serde::{Deserialize, Serialize};

use super::ends::Credentials;
use super::plan::{self, Plan, cpu_time};
use super::pool::Pool;
use super::{Mode, Shape, bare, push, quinn, tcp};

/// What the receiving process starts from: its first line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub mode: Mode,
    pub plan: Plan,
    pub shape: Shape,
    pub credentials: Option<Credentials>,
}

/// A receiving process.
pub(crate) struct Peer {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts it; it says in words of its mode when it is ready, and how it is reached.
    pub fn start(setup: &Setup) -> anyhow::Result<(Self, String)> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", "transfer", "receive"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the receiving process")?;
        let lines = BufReader::new(child.stdout.take().context("no output of the receiving process")?);
        let mut peer = Self { child, lines };
        let ready = peer.ask(&serde_json::to_string(setup)?)?;
        Ok((peer, ready))
    }

    /// Its processor time from here on is what [`Self::stop`] tells.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        self.ask("begin").map(drop)
    }

    pub fn stop(&mut self) -> anyhow::Result<Duration> {
        Ok(Duration::from_nanos(self.ask("stop")?.parse()?))
    }

    /// Blocks that are right and wrong.
    pub fn verify(&mut self) -> anyhow::Result<(usize, usize)> {
        let answer = self.ask("verify")?;
        let (right, wrong) = answer.split_once(' ').context("no two numbers")?;
        Ok((right.parse()?, wrong.parse()?))
    }

    fn ask(&mut self, question: &str) -> anyhow::Result<String> {
        let input = self.child.stdin.as_mut().context("no input of the receiving process")?;
        writeln!(input, "{question}")?;
        let mut answer = String::new();
        if self.lines.read_line(&mut answer)? == 0 {
            bail!("the receiving process has ended");
        }
        Ok(answer.trim_end().to_owned())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends with its input; one that does not is of no more use.
        drop(self.child.stdin.take());
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Asks the thread that owns the pool for [`Pool::verify`].
pub(crate) type Questions = Receiver<Sender<(usize, usize)>>;

/// Answers, if something was asked.
pub(crate) fn answer(questions: &Questions, pool: &Pool) {
    for asked in questions.try_iter() {
        // Who asked waits for it, unless it has ended.
        let _ = asked.send(pool.verify());
    }
}

/// Is the receiving process until its input ends.
pub(crate) fn receive() -> anyhow::Result<()> {
    let mut lines = std::io::stdin().lines();
    let first = lines.next().context("no setup")??;
    let setup: Setup = serde_json::from_str(&first)?;
    plan::pin(setup.shape.pin_recv)?;
    let (ask, questions) = crossbeam_channel::bounded(1);
    let ready = match setup.mode {
        Mode::Shm | Mode::Quic | Mode::Rdma => push::receive(&setup, questions)?,
        Mode::ShmBare => bare::receive(&setup, questions)?,
        Mode::Tcp => tcp::receive(&setup, questions)?,
        Mode::Quinn => quinn::receive(&setup, questions)?,
        Mode::Memcpy | Mode::MemcpySum => bail!("needs no second process"),
    };
    say(&ready)?;
    let mut before = Duration::ZERO;
    for line in lines {
        match line?.as_str() {
            "begin" => {
                before = cpu_time();
                say("ok")?;
            }
            "stop" => say(&(cpu_time() - before).as_nanos().to_string())?,
            "verify" => {
                let (answer, answered) = crossbeam_channel::bounded(1);
                ask.send(answer)?;
                let (right, wrong) = answered.recv()?;
                say(&format!("{right} {wrong}"))?;
            }
            other => bail!("`{other}` is no question"),
        }
    }
    Ok(())
}

fn say(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

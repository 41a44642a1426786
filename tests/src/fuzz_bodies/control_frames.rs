//! Frames on a control connection, however they are cut: what comes out is what was sent, in order, and a length that is too long ends it.
//!
//! The bytes `01 05 02 00 00 05 00 00 00 68 65 …` are a read that gives 5 bytes, one that gives nothing yet, and so on; what the reads give is also
//! parsed by the simplest means, all at once. The same bytes say how a socket takes what is sent.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use farbus_transport::link::control::{Control, ControlError, ControlStream, Framed, MAX_FRAME};

use super::input::Input;

/// What the socket does at one call.
enum Answer {
    /// Gives these bytes, or takes as many.
    Some(Vec<u8>),
    /// Has nothing, or no room.
    Later,
    /// Was interrupted.
    Again,
    /// Is at its end.
    End,
}

/// A stream that follows a script; at the script's end it has nothing to give, and takes everything.
struct Scripted {
    answers: VecDeque<Answer>,
    taken: Vec<u8>,
    /// Always ready, so that nobody waits.
    ready: File,
}

impl Scripted {
    fn new(answers: VecDeque<Answer>) -> Framed<Self> {
        let ready = File::options().read(true).write(true).open("/dev/null").expect("/dev/null");
        Framed::new(Self { answers, taken: Vec::new(), ready }).expect("a stream without a socket")
    }
}

impl Read for Scripted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.answers.pop_front() {
            None | Some(Answer::Later) => Err(ErrorKind::WouldBlock.into()),
            Some(Answer::Again) => Err(ErrorKind::Interrupted.into()),
            Some(Answer::End) => Ok(0),
            // No bytes would be the end.
            Some(Answer::Some(bytes)) if bytes.is_empty() => Err(ErrorKind::Interrupted.into()),
            Some(Answer::Some(bytes)) => {
                into[..bytes.len()].copy_from_slice(&bytes);
                Ok(bytes.len())
            }
        }
    }
}

impl Write for Scripted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = match self.answers.pop_front() {
            None => bytes.len(),
            Some(Answer::Later) => return Err(ErrorKind::WouldBlock.into()),
            Some(Answer::Again) => return Err(ErrorKind::Interrupted.into()),
            Some(Answer::End) => return Err(ErrorKind::BrokenPipe.into()),
            Some(Answer::Some(some)) => some.len().clamp(1, bytes.len()),
        };
        self.taken.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ControlStream for Scripted {
    fn socket(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    fn make_nonblocking(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A peer's bytes, and a socket's whims.
pub fn control_frames(bytes: &[u8]) {
    receive(script(bytes));
    send(bytes, script(bytes));
}

fn script(bytes: &[u8]) -> VecDeque<Answer> {
    let mut input = Input(bytes);
    let mut answers = VecDeque::new();
    while let Some(kind) = input.u8() {
        answers.push_back(match kind % 8 {
            0 => Answer::Later,
            2 => Answer::Again,
            4 => Answer::End,
            6 => {
                // A whole frame of one byte again and again: long ones need no long input.
                let (Some(len), Some(byte)) = (input.u16(), input.u8()) else { break };
                let len = usize::from(len) % (MAX_FRAME - 3);
                let mut frame = (len as u32).to_le_bytes().to_vec();
                frame.resize(4 + len, byte);
                Answer::Some(frame)
            }
            _ => match input.piece() {
                Some(piece) => Answer::Some(piece.to_vec()),
                None => break,
            },
        });
    }
    answers
}

/// All frames that are whole, and the length that ends them.
fn parse(mut bytes: &[u8]) -> (Vec<&[u8]>, Option<usize>) {
    let mut frames = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        if len > MAX_FRAME {
            return (frames, Some(len));
        }
        let Some((frame, rest)) = rest.split_at_checked(len) else { break };
        frames.push(frame);
        bytes = rest;
    }
    (frames, None)
}

fn receive(answers: VecDeque<Answer>) {
    let mut sent = Vec::new();
    for answer in &answers {
        match answer {
            Answer::Some(bytes) => sent.extend_from_slice(bytes),
            Answer::Later | Answer::Again => {}
            Answer::End => break,
        }
    }
    let ends = answers.iter().any(|answer| matches!(answer, Answer::End));
    let looks = answers.iter().filter(|answer| matches!(answer, Answer::Later)).count() + 1;
    let (frames, too_long) = parse(&sent);
    let mut framed = Scripted::new(answers);
    let mut got = Vec::new();
    // As its owner does: whenever something may have come, until there is nothing more.
    for _ in 0..looks {
        let error = loop {
            match framed.receive() {
                Ok(Some(frame)) => got.push(frame),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        match error {
            None => {}
            Some(ControlError::TooLong { len }) => {
                assert_eq!(Some(len), too_long, "a good length was refused");
                assert!(frames.starts_with(&got.iter().map(Vec::as_slice).collect::<Vec<_>>()), "other frames than were sent");
                return;
            }
            Some(ControlError::Gone) => {
                assert!(ends, "the end came by itself");
                break;
            }
            // More than anybody may leave lying about.
            Some(ControlError::Flood) => return assert!(frames.len() > 4096, "{} frames are no flood", frames.len()),
            Some(error) => panic!("{error}"),
        }
    }
    assert_eq!(too_long, None, "a length that is too long was taken");
    assert_eq!(got, frames, "other frames than were sent");
}

fn send(bytes: &[u8], answers: VecDeque<Answer>) {
    let broken = answers.iter().any(|answer| matches!(answer, Answer::End));
    let mut framed = Scripted::new(answers);
    let mut expected = Vec::new();
    for frame in bytes.chunks(200).chain([&[][..]]) {
        match framed.send(frame) {
            Ok(()) => {
                expected.extend_from_slice(&(frame.len() as u32).to_le_bytes());
                expected.extend_from_slice(frame);
            }
            Err(ControlError::Gone) => {
                assert!(broken, "a socket that goes on was given up");
                assert!(matches!(framed.send(b"more"), Err(ControlError::Gone)), "a frame follows half a frame");
                break;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(framed.stream().taken.starts_with(&expected), "other bytes than were sent");
}

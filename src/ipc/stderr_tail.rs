//! The last part of what a child writes to a stream that nobody else reads.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that are kept.
const TAIL_BYTES: usize = 64 << 10;

/// A process that the child started may hold the stream open after it; it is not waited for longer.
const WAIT_FOR_END: Duration = Duration::from_millis(500);

/// A stream that a thread reads to its end.
pub struct Tail {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Tail {
    pub fn of(mut stream: impl Read + Send + 'static) -> Self {
        let kept: Arc<Mutex<Vec<u8>>> = Arc::default();
        let of_reader = kept.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                let mut kept = of_reader.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..n]);
                let surplus = kept.len().saturating_sub(TAIL_BYTES);
                kept.drain(..surplus);
            }
        });
        Self { kept, reader }
    }

    /// What was written last, for a child that has ended.
    pub fn bytes(&self) -> Vec<u8> {
        let began = Instant::now();
        while !self.reader.is_finished() && began.elapsed() < WAIT_FOR_END {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

//! A stand-in for the operator's terminal: types a command line, keeps what comes back.

use std::io::Write;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use walfleet_ctl::{Exit, Surroundings, run};

use crate::controller::Controller;

/// Every transcript's clock.
pub const NOW: &str = "2026-06-04T14:41:59Z";

pub struct Terminal {
    surroundings: Surroundings,
    /// Dynamic text and what stands for it in transcripts.
    masks: Vec<(String, &'static str)>,
    home: tempfile::TempDir,
}

#[derive(Debug)]
pub struct Answer {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Terminal {
    pub fn alone() -> Terminal {
        Terminal::typing("")
    }

    /// Where standard input holds `text`.
    pub fn typing(text: &str) -> Terminal {
        let home = tempfile::tempdir().unwrap();
        let now: Timestamp = NOW.parse().unwrap();
        let surroundings = Surroundings::bare(now, std::io::Cursor::new(text.to_owned().into_bytes()))
            .with_variable("HOME", home.path().display().to_string())
            .with_variable("USER", "ann");
        let masks = vec![(home.path().display().to_string(), "HOME")];
        Terminal { surroundings, masks, home }
    }

    pub fn at(self, controller: &Controller) -> Terminal {
        let address = controller.address.to_string();
        self.with_context(&format!("controller: http://{address}\n")).masked(address, "CONTROLLER")
    }

    pub fn with_context(mut self, context: &str) -> Terminal {
        let path = self.file("context.yaml", context);
        self.surroundings = self.surroundings.with_variable("WALFLEET_CONTEXT", path);
        self
    }

    pub fn masked(mut self, text: String, name: &'static str) -> Terminal {
        self.masks.push((text, name));
        self
    }

    pub fn in_zone(mut self, zone: &str) -> Terminal {
        self.surroundings.zone = TimeZone::get(zone).unwrap();
        self
    }

    pub fn with_variable(mut self, name: &str, value: &str) -> Terminal {
        self.surroundings = self.surroundings.with_variable(name, value);
        self
    }

    pub fn at_time(mut self, now: &str) -> Terminal {
        self.surroundings.fixed_now = Some(now.parse().unwrap());
        self
    }

    pub fn with_person(mut self) -> Terminal {
        self.surroundings.stdin_is_terminal = true;
        self
    }

    pub fn on_colour_screen(mut self) -> Terminal {
        self.surroundings.stdout_is_terminal = true;
        self
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.home.path().join(name)
    }

    pub fn context_now(&self) -> String {
        std::fs::read_to_string(self.path("context.yaml")).unwrap()
    }

    /// Makes a file and gives its path.
    pub fn file(&self, name: &str, content: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    pub async fn types(&self, line: &str) -> Answer {
        let (stdout, stderr) = (Buffer::default(), Buffer::default());
        let exit = run(words(line), &self.surroundings, &mut stdout.clone(), &mut stderr.clone()).await;
        Answer { exit, stdout: self.mask(&stdout.text()), stderr: self.mask(&stderr.text()) }
    }

    /// For what a terminal's reader does to a program: `stdout` breaks after `bytes`.
    pub async fn types_into(&self, line: &str, stdout: &mut (dyn Write + Send)) -> (Exit, String) {
        let stderr = Buffer::default();
        let exit = run(words(line), &self.surroundings, stdout, &mut stderr.clone()).await;
        (exit, self.mask(&stderr.text()))
    }

    /// `text` without what differs from run to run.
    pub fn mask(&self, text: &str) -> String {
        self.masks.iter().fold(text.to_owned(), |text, (secret, name)| text.replace(secret, name))
    }
}

/// As a shell would split it, single quotes included.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted, mut any) = (String::new(), false, false);
    for c in line.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                any = true;
            }
            ' ' if !quoted => {
                if any || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            c => word.push(c),
        }
    }
    if any || !word.is_empty() {
        words.push(word);
    }
    words
}

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

//! Transcripts: commands in, text out, compared with a file.

use std::path::PathBuf;

use crate::terminal::{Answer, Terminal};

pub struct Transcript {
    name: &'static str,
    text: String,
}

impl Transcript {
    pub fn of(name: &'static str) -> Transcript {
        Transcript { name, text: String::new() }
    }

    /// Types a line and writes down what came of it: stdout as it is, stderr behind `2>`, then the exit code.
    pub async fn types(&mut self, terminal: &Terminal, line: &str) -> Answer {
        let answer = terminal.types(line).await;
        let line = terminal.mask(line);
        let stderr: String =
            answer.stderr.lines().map(|line| format!("2> {line}").trim_end().to_owned() + "\n").collect();
        self.text.push_str(&format!("$ {line}\n{}{stderr}[exit {}]\n\n", answer.stdout, answer.exit.code()));
        answer
    }

    /// A remark between commands.
    pub fn remark(&mut self, text: &str) {
        self.text.push_str(&format!("# {text}\n"));
    }

    pub fn check(self) {
        let path =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts").join(format!("{}.txt", self.name));
        if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
            std::fs::write(&path, &self.text).unwrap();
            return;
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        if expected == self.text {
            return;
        }
        let differs = expected.lines().zip(self.text.lines()).position(|(before, now)| before != now);
        let line = differs.unwrap_or_else(|| expected.lines().count().min(self.text.lines().count()));
        let show = |text: &str| text.lines().skip(line.saturating_sub(3)).take(8).collect::<Vec<_>>().join("\n");
        panic!(
            "{} differs from line {}\n--- expected\n{}\n--- now\n{}\nIf now is right: UPDATE_TRANSCRIPTS=1 cargo test -p walfleet-ctl",
            path.display(),
            line + 1,
            show(&expected),
            show(&self.text)
        );
    }
}

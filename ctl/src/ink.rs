//! Colour as marks inside text, turned into terminal codes, or taken out, in one last step.
//!
//! The marks are format characters without width (U+2061 to U+2064, U+2060), so that columns are measured as if they
//! were not there. The same step takes control characters out of what servers and files say: a name must not be able
//! to move the cursor or rewrite a line of the operator's terminal.

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ink {
    Bad,
    Warn,
    Good,
    Faint,
}

const END: char = '\u{2060}';

impl Ink {
    const ALL: [Ink; 4] = [Ink::Bad, Ink::Warn, Ink::Good, Ink::Faint];

    fn mark(self) -> char {
        match self {
            Ink::Bad => '\u{2061}',
            Ink::Warn => '\u{2062}',
            Ink::Good => '\u{2063}',
            Ink::Faint => '\u{2064}',
        }
    }

    fn code(self) -> &'static str {
        match self {
            Ink::Bad => "\u{1b}[1;31m",
            Ink::Warn => "\u{1b}[33m",
            Ink::Good => "\u{1b}[32m",
            Ink::Faint => "\u{1b}[2m",
        }
    }

    pub fn on(self, text: &str) -> String {
        format!("{}{text}{END}", self.mark())
    }
}

/// `text` as a terminal (or a file) may have it.
pub fn finish(text: &str, colour: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            END => out.push_str(if colour { "\u{1b}[0m" } else { "" }),
            '\n' => out.push(c),
            '\t' => out.push_str("    "),
            c if c.is_control() || is_bidi_control(c) => out.push('\u{fffd}'),
            c => match Ink::ALL.into_iter().find(|ink| ink.mark() == c) {
                Some(ink) => out.push_str(if colour { ink.code() } else { "" }),
                None => out.push(c),
            },
        }
    }
    out
}

/// Characters that reorder what is shown (Unicode TR 36, "Trojan source").
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_steer_the_terminal() {
        assert_eq!(finish("a\u{1b}[2Jb\rc\u{7}\u{9b}d", true), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}\u{fffd}d");
    }

    #[test]
    fn colour_appears_only_where_it_is_wanted() {
        assert_eq!(finish(&Ink::Bad.on("x"), false), "x");
        assert_eq!(finish(&Ink::Bad.on("x"), true), "\u{1b}[1;31mx\u{1b}[0m");
    }
}

//! Splits PTX text into words, strings and punctuation.

use crate::LoadError;

/// One token and the line that it is on (from 1).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub kind: Kind,
    pub line: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// An identifier, directive, opcode with its modifiers, register or number.
    Word(String),
    Text(String),
    Punct(char),
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

pub(crate) fn tokens(text: &str) -> Result<Vec<Token>, LoadError> {
    let bytes = text.as_bytes();
    let (mut at, mut line, mut out) = (0, 1u32, Vec::new());
    while at < bytes.len() {
        let c = bytes[at];
        let rest = &bytes[at..];
        if c == b'\n' {
            line += 1;
            at += 1;
        } else if c.is_ascii_whitespace() || c == 0 {
            at += 1;
        } else if rest.starts_with(b"//") {
            at += rest.iter().position(|&c| c == b'\n').unwrap_or(rest.len());
        } else if rest.starts_with(b"/*") {
            let end = text[at..].find("*/").ok_or_else(|| LoadError::syntax(line, "comment without end"))?;
            line += rest[..end].iter().filter(|&&c| c == b'\n').count() as u32;
            at += end + 2;
        } else if c == b'"' {
            let end = rest[1..]
                .iter()
                .position(|&c| c == b'"')
                .ok_or_else(|| LoadError::syntax(line, "string without end"))?;
            out.push(Token { kind: Kind::Text(String::from_utf8_lossy(&rest[1..=end]).into_owned()), line });
            at += end + 2;
        } else if is_word(c) {
            let start = at;
            // Directives may stand close together, as in `.reg.b32`.
            let directive = c == b'.';
            while at < bytes.len() && (is_word(bytes[at]) || bytes[at..].starts_with(b"::")) {
                if directive && at > start && bytes[at] == b'.' {
                    break;
                }
                at += if bytes[at] == b':' { 2 } else { 1 };
            }
            out.push(Token { kind: Kind::Word(text[start..at].to_string()), line });
        } else if c.is_ascii() {
            out.push(Token { kind: Kind::Punct(c as char), line });
            at += 1;
        } else {
            return Err(LoadError::syntax(line, "a character outside ASCII"));
        }
    }
    Ok(out)
}

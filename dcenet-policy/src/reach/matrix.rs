//! A report as a matrix: sources as rows, destinations as columns, one for each probe and family.
//!
//! [`Report::matrix_text`] is for terminals, [`Report::matrix_svg`] for documents, [`Report::matrix_html`] one page that
//! needs nothing else: tables that screen readers can walk, in light or dark as the reader's system is. HTML and SVG are
//! well-formed XML; names are escaped. No verdict is told by colour alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};

use super::{Answer, Family, Report};
use crate::model::{PodId, Verdict};

/// All of one probe and family.
struct Matrix<'a> {
    probe: &'a str,
    family: Family,
    pods: Vec<&'a PodId>,
    cells: BTreeMap<(&'a PodId, &'a PodId), Cell<'a>>,
}

/// All answers for a pair of pods, several where they have several addresses or ports of the name.
type Cell<'a> = Vec<&'a Answer>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Allowed,
    Denied,
    Mixed,
    NotAsked,
}

impl State {
    const ALL: [Self; 4] = [Self::Allowed, Self::Denied, Self::Mixed, Self::NotAsked];

    fn of(cell: Option<&Cell<'_>>) -> Self {
        let verdicts: BTreeSet<Verdict> = cell.into_iter().flatten().map(|answer| answer.verdict).collect();
        match (verdicts.contains(&Verdict::Allow), verdicts.contains(&Verdict::Deny)) {
            (true, true) => Self::Mixed,
            (true, false) => Self::Allowed,
            (false, true) => Self::Denied,
            (false, false) => Self::NotAsked,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Mixed => "mixed",
            Self::NotAsked => "not asked",
        }
    }

    const fn sign(self) -> char {
        match self {
            Self::Allowed => '.',
            Self::Denied => 'X',
            Self::Mixed => '~',
            Self::NotAsked => '-',
        }
    }

    const fn class(self) -> &'static str {
        match self {
            Self::Allowed => "a",
            Self::Denied => "d",
            Self::Mixed => "m",
            Self::NotAsked => "n",
        }
    }
}

impl Report {
    fn matrices(&self) -> Vec<Matrix<'_>> {
        let mut matrices: Vec<Matrix<'_>> = Vec::new();
        let mut index: BTreeMap<(&str, Family), usize> = BTreeMap::new();
        for answer in &self.results {
            let at = *index.entry((&answer.probe, answer.family)).or_insert_with(|| {
                let (probe, family) = (answer.probe.as_str(), answer.family);
                matrices.push(Matrix { probe, family, pods: Vec::new(), cells: BTreeMap::new() });
                matrices.len() - 1
            });
            matrices[at].cells.entry((&answer.source, &answer.destination)).or_default().push(answer);
        }
        for matrix in &mut matrices {
            let pods: BTreeSet<&PodId> = matrix.cells.keys().flat_map(|(from, to)| [*from, *to]).collect();
            matrix.pods = pods.into_iter().collect();
        }
        matrices
    }

    /// Matrices of `.` (allowed), `X` (denied), `~` (some of several addresses or ports) and `-` (not asked), each below
    /// `== PROBE FAMILY`. Columns are numbered as the rows are.
    pub fn matrix_text(&self) -> String {
        let mut text = String::new();
        for matrix in self.matrices() {
            let wide = matrix.pods.iter().map(|pod| pod.to_string().chars().count()).max().unwrap_or(0);
            let digits = matrix.pods.len().to_string().len();
            let _ = write!(text, "== {matrix}\n{:digits$} {:wide$}", "", "");
            for number in 1..=matrix.pods.len() {
                let _ = write!(text, " {number:>digits$}");
            }
            text.push('\n');
            for (number, source) in (1..).zip(&matrix.pods) {
                let _ = write!(text, "{number:>digits$} {:wide$}", source.to_string());
                for destination in &matrix.pods {
                    let _ = write!(text, " {:>digits$}", matrix.state(source, destination).sign());
                }
                text.push('\n');
            }
        }
        text
    }

    /// One picture of all matrices, below each other. What decided is in each cell's `title`.
    pub fn matrix_svg(&self) -> String {
        let matrices = self.matrices();
        let longest = matrices.iter().flat_map(|matrix| &matrix.pods).map(|pod| pod.to_string().chars().count()).max();
        // Letters of a monospaced font are about 0.6 of its size wide.
        let label = longest.unwrap_or(0) * LETTER + 2 * LETTER;
        let widest = matrices.iter().map(|matrix| matrix.pods.len()).max().unwrap_or(0);
        let height: usize = matrices.iter().map(|matrix| matrix.pods.len() * CELL + label + 2 * CELL).sum();
        let (width, height) = (label + widest * CELL + CELL, height + 2 * CELL);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             role=\"img\" font-family=\"monospace\" font-size=\"12\">\n<title>Reachability by {}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"page\" width=\"{width}\" height=\"{height}\"/>\n",
            escaped(self.engine)
        );
        let mut top = CELL;
        for matrix in &matrices {
            let _ = writeln!(
                svg,
                "<text class=\"t\" x=\"{LETTER}\" y=\"{top}\" font-weight=\"bold\">{}</text>",
                escaped(matrix)
            );
            let grid = top + label;
            for (column, pod) in matrix.pods.iter().enumerate() {
                let (x, y) = (label + column * CELL + CELL * 2 / 3, grid - LETTER);
                let _ = writeln!(
                    svg,
                    "<text class=\"t\" transform=\"translate({x} {y}) rotate(-90)\">{}</text>",
                    escaped(pod)
                );
            }
            for (row, source) in matrix.pods.iter().enumerate() {
                let y = grid + row * CELL;
                let _ = writeln!(
                    svg,
                    "<text class=\"t\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                    label - LETTER,
                    y + CELL * 2 / 3,
                    escaped(source)
                );
                for (column, destination) in matrix.pods.iter().enumerate() {
                    let (state, x) = (matrix.state(source, destination), label + column * CELL);
                    let _ = writeln!(
                        svg,
                        "<g><title>{}</title><rect class=\"{}\" x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\"/>\
                         <text class=\"s\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text></g>",
                        escaped(matrix.why(source, destination)),
                        state.class(),
                        x + CELL / 2,
                        y + CELL * 2 / 3,
                        state.sign()
                    );
                }
            }
            top = grid + matrix.pods.len() * CELL + 2 * CELL;
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// One page with a table for each probe and family, what was not asked, and the notes. What decided is each cell's
    /// title.
    pub fn matrix_html(&self) -> String {
        let mut page = format!(
            "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width\"/>\n<meta name=\"color-scheme\" content=\"light dark\"/>\n\
             <title>Reachability</title>\n<style>{STYLE}{PAGE}</style>\n</head>\n<body>\n<main>\n<h1>Reachability by {}</h1>\n\
             <p>Rows open connections to columns.",
            escaped(self.engine)
        );
        for state in State::ALL {
            let _ = write!(page, " <span class=\"{}\">{}</span> {}", state.class(), state.sign(), state.word());
        }
        page.push_str("</p>\n");
        for matrix in self.matrices() {
            let _ = write!(
                page,
                "<div class=\"wide\"><table>\n<caption>{}</caption>\n<thead><tr><th scope=\"col\">from \\ to</th>",
                escaped(&matrix)
            );
            for pod in &matrix.pods {
                let _ = write!(page, "<th scope=\"col\">{}</th>", escaped(pod));
            }
            page.push_str("</tr></thead>\n<tbody>\n");
            for source in &matrix.pods {
                let _ = write!(page, "<tr><th scope=\"row\">{}</th>", escaped(source));
                for destination in &matrix.pods {
                    let state = matrix.state(source, destination);
                    let _ = write!(
                        page,
                        "<td class=\"{}\" title=\"{}\"><span aria-hidden=\"true\">{}</span><span class=\"read\">{}</span></td>",
                        state.class(),
                        escaped(matrix.why(source, destination)),
                        state.sign(),
                        state.word()
                    );
                }
                page.push_str("</tr>\n");
            }
            page.push_str("</tbody>\n</table></div>\n");
        }
        let not_asked: Vec<String> = self
            .not_asked
            .iter()
            .map(|of| format!("{} {} to {}: {}", of.probe, of.source, of.destination, of.reason))
            .collect();
        let notes: Vec<String> = self.notes.iter().map(|note| note.text.clone()).collect();
        for (heading, list) in [("Not asked", not_asked), ("Notes", notes)] {
            if !list.is_empty() {
                let items: String = list.iter().map(|item| format!("<li>{}</li>\n", escaped(item))).collect();
                let _ = write!(page, "<h2>{heading}</h2>\n<ul>\n{items}</ul>\n");
            }
        }
        page.push_str("</main>\n</body>\n</html>\n");
        page
    }
}

impl Matrix<'_> {
    fn state(&self, source: &PodId, destination: &PodId) -> State {
        State::of(self.cells.get(&(source, destination)))
    }

    /// What decided.
    fn why(&self, source: &PodId, destination: &PodId) -> String {
        let cell = self.cells.get(&(source, destination));
        let mut why = format!("{source} to {destination}: {}", State::of(cell).word());
        for Answer { source_address, destination_address, egress, ingress, .. } in cell.into_iter().flatten() {
            let _ = write!(
                why,
                "; {source_address} to {destination_address}: egress {}: {}; ingress {}: {}",
                egress.verdict, egress.text, ingress.verdict, ingress.text
            );
        }
        why
    }
}

impl fmt::Display for Matrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::Ipv4 => "ipv4",
            Family::Ipv6 => "ipv6",
        };
        write!(f, "{} {family}", self.probe)
    }
}

/// Text as it may stand in an element and in an attribute; what XML 1.0 has no characters for (section 2.2) is replaced.
fn escaped(text: impl fmt::Display) -> String {
    let mut out = String::new();
    for character in text.to_string().chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' | '\r' => out.push(' '),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

const CELL: usize = 24;
const LETTER: usize = 8;

/// Pairs of colours with a contrast of 4.5 or more (WCAG 2.2, success criterion 1.4.3).
const STYLE: &str = "\
:root{--page:#fff;--text:#111;--a:#d9f2dd;--d:#f9d4d4;--m:#fbeec2;--n:#eee;--line:#999}\
@media (prefers-color-scheme:dark){:root{--page:#111;--text:#eee;--a:#174d22;--d:#6b1d1d;--m:#5c4a0a;--n:#333;--line:#777}}\
.page{fill:var(--page)}text{fill:var(--text)}rect{stroke:var(--line)}.page{stroke:none}\
.a{fill:var(--a);background:var(--a)}.d{fill:var(--d);background:var(--d)}\
.m{fill:var(--m);background:var(--m)}.n{fill:var(--n);background:var(--n)}";

const PAGE: &str = "\
body{background:var(--page);color:var(--text);font:14px/1.4 system-ui,sans-serif;margin:2em}\
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1em 0}caption{text-align:left;font-weight:bold}\
th,td{border:1px solid var(--line);padding:.2em .6em;text-align:center}th{font-family:monospace}\
.read{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}p span{padding:0 .4em}";

#[cfg(test)]
mod tests {
    use super::*;

    /// WCAG 2.2, "relative luminance", of `#rgb` or `#rrggbb`.
    fn luminance(colour: &str) -> f64 {
        let digits: Vec<u8> = colour.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
        let channels: Vec<u8> = match digits[..] {
            [r, g, b] => [r, g, b].map(|digit| digit * 17).to_vec(),
            _ => digits.chunks(2).map(|pair| pair[0] * 16 + pair[1]).collect(),
        };
        assert_eq!(channels.len(), 3, "{colour}");
        let linear = channels.into_iter().map(|channel| {
            let part = f64::from(channel) / 255.0;
            if part <= 0.040_45 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
        });
        linear.zip([0.2126, 0.7152, 0.0722]).map(|(channel, weight)| channel * weight).sum()
    }

    fn contrast(one: &str, other: &str) -> f64 {
        let (one, other) = (luminance(one), luminance(other));
        (one.max(other) + 0.05) / (one.min(other) + 0.05)
    }

    #[test]
    fn text_is_read_on_every_background_in_light_and_dark() {
        assert!((contrast("#fff", "#000") - 21.0).abs() < 1e-9 && contrast("#777", "#fff") < 4.5);
        let schemes: Vec<&str> = STYLE.split(":root{").skip(1).filter_map(|rest| rest.split('}').next()).collect();
        assert_eq!(schemes.len(), 2);
        for scheme in schemes {
            let colours: BTreeMap<&str, &str> = scheme.split(';').filter_map(|pair| pair.split_once(':')).collect();
            for background in ["--page", "--a", "--d", "--m", "--n"] {
                let found = contrast(colours["--text"], colours[background]);
                assert!(found >= 4.5, "{background} in {scheme}: {found:.2}");
            }
        }
    }
}

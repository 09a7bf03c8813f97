//! A figure of several lines over logarithmic axes, as SVG.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 370.0;
const TOP: f64 = 30.0;
const RIGHT: f64 = 560.0;
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#000000"];

/// One line: what it is called, and its points.
pub type Line = (String, Vec<(f64, f64)>);

/// Draws lines; both axes are logarithmic, and begin at 1.
pub fn svg(title: &str, [x, y]: [&str; 2], lines: &[Line]) -> String {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let top = |values: Vec<f64>| values.into_iter().fold(10.0, f64::max).log10().ceil();
    let (decades_x, decades_y) = (top(points().map(|p| p.0).collect()), top(points().map(|p| p.1).collect()));
    let at_x = |value: f64| LEFT + value.max(1.0).log10() / decades_x * (RIGHT - LEFT);
    let at_y = |value: f64| BOTTOM - value.max(1.0).log10() / decades_y * (BOTTOM - TOP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"18\" \
         font-size=\"14\">{title}</text>\n"
    );
    let mut add = |part: String| {
        let _always = writeln!(svg, "{part}");
    };
    for decade in 0..=decades_x as i32 {
        let value = 10f64.powi(decade);
        let place = at_x(value);
        add(format!("<path d=\"M{place:.1} {TOP}V{BOTTOM}\" stroke=\"#ddd\"/>"));
        add(format!("<text x=\"{place:.1}\" y=\"{}\" text-anchor=\"middle\">{value}</text>", BOTTOM + 16.0));
    }
    for decade in 0..=decades_y as i32 {
        let value = 10f64.powi(decade);
        let place = at_y(value);
        add(format!("<path d=\"M{LEFT} {place:.1}H{RIGHT}\" stroke=\"#ddd\"/>"));
        add(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>", LEFT - 6.0, place + 4.0));
    }
    add(format!("<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{x}</text>", (LEFT + RIGHT) / 2.0, BOTTOM + 36.0));
    add(format!(
        "<text transform=\"translate(20 {:.1}) rotate(-90)\" text-anchor=\"middle\">{y}</text>",
        (TOP + BOTTOM) / 2.0
    ));
    for (number, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{:.1},{:.1}", at_x(*x), at_y(*y))).collect();
        add(format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", path.join(" ")));
        let place = TOP + 18.0 * number as f64 + 10.0;
        add(format!("<path d=\"M{:.1} {place}h20\" stroke=\"{colour}\" stroke-width=\"2\"/>", RIGHT + 14.0));
        add(format!("<text x=\"{:.1}\" y=\"{}\">{name}</text>", RIGHT + 40.0, place + 4.0));
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decades_are_as_far_apart_as_each_other() {
        let line = ("a".to_owned(), vec![(1.0, 1.0), (10.0, 10.0), (100.0, 100.0)]);
        let text = svg("t", ["x", "y"], &[line]);
        let points = text.split("points=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
        assert_eq!(points, "70.0,370.0 315.0,200.0 560.0,30.0");
    }
}

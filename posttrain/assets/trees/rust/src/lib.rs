//! Spans of numbers: where they lie, how long they are, how a share of them is called.

pub fn clamp(value: i64, low: i64, high: i64) -> i64 {
    if value < low {
        return low;
    }
    if value > high {
        return high;
    }
    value
}

pub fn overlaps(first: i64, last: i64, start: i64, stop: i64) -> bool {
    first <= stop && start <= last
}

pub fn total(lengths: &[i64]) -> i64 {
    let mut found = 0;
    for length in lengths {
        found += length;
    }
    found
}

pub fn share(part: i64, whole: i64) -> i64 {
    if whole == 0 {
        return 0;
    }
    100 * part / whole
}

pub fn label(percent: i64) -> &'static str {
    if percent >= 100 {
        return "full";
    }
    if percent > 50 {
        return "most";
    }
    "some"
}

pub fn is_even(number: i64) -> bool {
    number % 2 == 0
}

pub fn rising(values: &[i64]) -> bool {
    for place in 1..values.len() {
        if values[place] < values[place - 1] {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clamp_keeps_to_its_limits() {
        assert_eq!(clamp(5, 1, 9), 5);
        assert_eq!(clamp(0, 1, 9), 1);
        assert_eq!(clamp(12, 1, 9), 9);
    }

    #[test]
    fn spans_overlap() {
        assert!(overlaps(1, 4, 4, 6));
        assert!(!overlaps(1, 3, 4, 6));
    }
}

use spans::{is_even, label, rising, share, total};

#[test]
fn totals() {
    assert_eq!(total(&[]), 0);
    assert_eq!(total(&[3, 4, 5]), 12);
}

#[test]
fn shares() {
    assert_eq!(share(1, 4), 25);
    assert_eq!(share(3, 0), 0);
}

#[test]
fn labels() {
    for (percent, name) in [(100, "full"), (51, "most"), (50, "some")] {
        assert_eq!(label(percent), name);
    }
}

#[test]
fn even_numbers() {
    assert!(is_even(4));
    assert!(!is_even(7));
}

#[test]
fn rising_values() {
    assert!(rising(&[1, 2, 2, 5]));
    assert!(!rising(&[3, 1]));
}

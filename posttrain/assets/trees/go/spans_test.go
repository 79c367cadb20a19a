package spans

import "testing"

func TestClamp(t *testing.T) {
	if got := Clamp(5, 1, 9); got != 5 {
		t.Errorf("Clamp(5, 1, 9) = %d, want 5", got)
	}
	if got := Clamp(0, 1, 9); got != 1 {
		t.Errorf("Clamp(0, 1, 9) = %d, want 1", got)
	}
	if got := Clamp(12, 1, 9); got != 9 {
		t.Errorf("Clamp(12, 1, 9) = %d, want 9", got)
	}
}

func TestOverlaps(t *testing.T) {
	if !Overlaps(1, 4, 4, 6) {
		t.Error("1..4 and 4..6 have 4 in common")
	}
	if Overlaps(1, 3, 4, 6) {
		t.Error("1..3 and 4..6 have nothing in common")
	}
}

func TestTotal(t *testing.T) {
	if got := Total([]int{3, 4, 5}); got != 12 {
		t.Errorf("Total = %d, want 12", got)
	}
}

func TestShare(t *testing.T) {
	if got := Share(1, 4); got != 25 {
		t.Errorf("Share(1, 4) = %d, want 25", got)
	}
	if got := Share(3, 0); got != 0 {
		t.Errorf("Share(3, 0) = %d, want 0", got)
	}
}

func TestLabel(t *testing.T) {
	cases := []struct {
		percent int
		name    string
	}{{100, "full"}, {51, "most"}, {50, "some"}}
	for _, one := range cases {
		t.Run(one.name, func(t *testing.T) {
			if got := Label(one.percent); got != one.name {
				t.Errorf("Label(%d) = %q, want %q", one.percent, got, one.name)
			}
		})
	}
}

func TestIsEven(t *testing.T) {
	if !IsEven(4) {
		t.Error("4 is even")
	}
	if IsEven(7) {
		t.Error("7 is odd")
	}
}

func TestRising(t *testing.T) {
	if !Rising([]int{1, 2, 2, 5}) {
		t.Error("1, 2, 2, 5 rise")
	}
	if Rising([]int{3, 1}) {
		t.Error("3, 1 fall")
	}
}

// Package spans says where spans of numbers lie, how long they are, how a share of them is called.
package spans

// Clamp keeps a value to its limits.
func Clamp(value, low, high int) int {
	if value < low {
		return low
	}
	if value > high {
		return high
	}
	return value
}

// Overlaps says whether two spans have a number in common.
func Overlaps(first, last, start, stop int) bool {
	return first <= stop && start <= last
}

// Total adds lengths.
func Total(lengths []int) int {
	found := 0
	for _, length := range lengths {
		found += length
	}
	return found
}

// Share is a part of the whole, percent.
func Share(part, whole int) int {
	if whole == 0 {
		return 0
	}
	return 100 * part / whole
}

// Label names a share.
func Label(percent int) string {
	if percent >= 100 {
		return "full"
	}
	if percent > 50 {
		return "most"
	}
	return "some"
}

// IsEven says whether two divides a number.
func IsEven(number int) bool {
	return number%2 == 0
}

// Rising says whether no value is less than the one before it.
func Rising(values []int) bool {
	for place := 1; place < len(values); place++ {
		if values[place] < values[place-1] {
			return false
		}
	}
	return true
}

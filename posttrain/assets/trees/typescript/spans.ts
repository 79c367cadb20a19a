/** Spans of numbers: where they lie, how long they are, how a share of them is called. */

export function clamp(value: number, low: number, high: number): number {
  if (value < low) {
    return low;
  }
  if (value > high) {
    return high;
  }
  return value;
}

export function overlaps(first: number, last: number, start: number, stop: number): boolean {
  return first <= stop && start <= last;
}

export function total(lengths: number[]): number {
  let found = 0;
  for (const length of lengths) {
    found += length;
  }
  return found;
}

export function share(part: number, whole: number): number {
  if (whole === 0) {
    return 0;
  }
  return (100 * part) / whole;
}

export function label(percent: number): string {
  if (percent >= 100) {
    return "full";
  }
  if (percent > 50) {
    return "most";
  }
  return "some";
}

export function isEven(number: number): boolean {
  return number % 2 === 0;
}

export function rising(values: number[]): boolean {
  for (let place = 1; place < values.length; place++) {
    if (values[place] < values[place - 1]) {
      return false;
    }
  }
  return true;
}

import FuzzEntry

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  unsafe fuzzMessages(RawSpan(_unsafeBytes: UnsafeRawBufferPointer(start: start, count: count)))
  return 0
}

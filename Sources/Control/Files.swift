import CLinux
import Datapath
import Glibc

/// Why a file could not be read.
struct FileReadError: Error, Equatable {
  /// The errno; EFBIG where the file is larger than the caller takes.
  var code: CInt

  var text: String { SystemError.text(code) }
}

/// Reads a whole file of at most `bytesMax` bytes, also one of /proc or /sys, whose size is not known before.
func readFile(_ path: String, bytesMax: Int) throws(FileReadError) -> [UInt8] {
  let descriptor = unsafe open(path, O_RDONLY | O_CLOEXEC)
  guard descriptor >= 0 else { throw FileReadError(code: errno) }
  defer { close(descriptor) }
  var bytes: [UInt8] = []
  var chunk = [UInt8](repeating: 0, count: 16_384)
  while true {
    let count = unsafe read(descriptor, &chunk, chunk.count)
    if count < 0 && errno == EINTR { continue }
    guard count >= 0 else { throw FileReadError(code: errno) }
    if count == 0 { return bytes }
    bytes += chunk[0..<count]
    guard bytes.count <= bytesMax else { throw FileReadError(code: EFBIG) }
  }
}
